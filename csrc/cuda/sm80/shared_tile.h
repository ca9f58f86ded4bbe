// A tile of q, k, v or dout in shared memory, and how it gets there.
#pragma once

#include "mma.h"

namespace flash_attn::cuda::sm80 {

/// (rows, kColumns) of 16-bit elements, row-major in chunks of 16 bytes. Eight rows at the same chunk, which one phase
/// of ldmatrix reads, must lie in eight different groups of banks: chunk c of a row stands at place c ^ (row % 8) where
/// a row is a multiple of 128 bytes; where it is an odd multiple of 64 bytes, two rows fill the banks, and the place is
/// c ^ (row / 2 % 4).
template <int kColumns>
struct SharedTile {
  static_assert(kColumns % 32 == 0);
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr bool kWholeLines = kRowBytes % 128 == 0;

  static constexpr int kSpan = kWholeLines ? 128 : 64;  // bytes of a row that its chunks change places in

  /// Bytes from the tile's start.
  SM80_DEVICE static uint32_t offset(int row, int chunk) {
    return uint32_t(row * kRowBytes + ((chunk ^ (kWholeLines ? row & 7 : row >> 1 & 3)) << 4));
  }

  /// From the address of a chunk, 0 or 1, to that of the same chunk of the 16 columns of number `step`. Only bits below
  /// kSpan are exchanged, and tiles are aligned to it.
  SM80_DEVICE static uint32_t along(uint32_t lane_address, int step) {
    return (lane_address ^ uint32_t(32 * step % kSpan)) + uint32_t(32 * step / kSpan * kSpan);
  }
};

/// threadIdx.x, as if it changed with each turn of a loop: what the compiler computes from it ahead of the loop costs
/// more, by the registers that hold it, than computing it again.
SM80_DEVICE uint32_t fresh_thread(int turn) {
  uint32_t thread;
  asm volatile(
      "{\n"
      ".reg .u32 x;\n"
      "mad.lo.u32 x, %1, 1024, %2;\n"
      "and.b32 %0, x, 1023;\n"
      "}"
      : "=r"(thread)
      : "r"(turn), "r"(threadIdx.x));
  return thread;
}

}  // namespace flash_attn::cuda::sm80
