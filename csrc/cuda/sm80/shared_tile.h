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

/// A piece of 16 bytes from anywhere: `columns` elements of it, and zeros.
template <typename Element>
SM80_DEVICE void store_unaligned_piece(uint32_t address, const Element* piece, int columns) {
  const uint16_t* const from = reinterpret_cast<const uint16_t*>(piece);
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t low = 2 * w < columns ? from[2 * w] : 0, high = 2 * w + 1 < columns ? from[2 * w + 1] : 0;
    words[w] = low | high << 16;
  }
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

/// How kThreads threads share out the 16-byte pieces of a tile of kRows rows: each has one chunk of each group of
/// chunks, and every kStep-th row.
template <int kRows, int kColumns, int kThreads>
struct TileCopy {
  using Tile = SharedTile<kColumns>;
  static constexpr int kPower = Tile::kChunks & -Tile::kChunks;  // the largest power of 2 that divides a row's chunks
  static constexpr int kGroup = kPower < kThreads / 8 ? kPower : kThreads / 8;
  static constexpr int kStep = kThreads / kGroup;
  static_assert(kThreads % kGroup == 0 && kRows % kStep == 0 && kStep % 8 == 0);

  /// A thread's first piece.
  SM80_DEVICE static int row(uint32_t thread) { return int(thread) / kGroup; }
  SM80_DEVICE static int chunk(uint32_t thread) { return int(thread) % kGroup; }
  SM80_DEVICE static uint32_t offset(uint32_t thread) { return Tile::offset(row(thread), chunk(thread)); }

  /// All of a tile. `to` and `from` are those of the thread's first piece, `step` the bytes from one of its rows to the
  /// next. Asynchronous: the caller commits and waits.
  SM80_DEVICE static void copy(uint32_t to, const char* from, int64_t step) {
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i, from += step) {
#pragma unroll
      for (int group = 0; group < Tile::kChunks; group += kGroup) {
        cp_async_16(to + i * kStep * Tile::kRowBytes + group * 16, from + group * 16);
      }
    }
  }
};

/// Rows [0, kRows) of a tile from `source`, its row 0. Rows for which `exists` is false are not read and become zeros,
/// as columns from `columns` on do; `all_exist` spares asking. Asynchronous where 16-byte pieces are aligned
/// (`aligned`): the caller commits and waits. Else with ordinary loads and stores, seen after the next barrier.
template <int kRows, int kColumns, int kThreads, bool kMayBeUnaligned, typename Element, typename Exists>
SM80_DEVICE void load_tile(uint32_t thread, uint32_t tile, const Element* source, int64_t row_stride, int columns,
                           bool aligned, bool all_exist, const Exists& exists) {
  using Tile = SharedTile<kColumns>;
  using Copy = TileCopy<kRows, kColumns, kThreads>;
  constexpr int kGroup = Copy::kGroup, kStep = Copy::kStep;
  const int row = Copy::row(thread), chunk = Copy::chunk(thread);
  const uint32_t to = tile + Copy::offset(thread);
  const Element* from = source + row * row_stride + 8 * chunk;
  if (all_exist && columns == kColumns && (!kMayBeUnaligned || aligned)) {  // nearly always
    Copy::copy(to, reinterpret_cast<const char*>(from), kStep * row_stride * int(sizeof(Element)));
    return;
  }
#pragma unroll 1
  for (int step = 0; step < kRows; step += kStep, from += kStep * row_stride) {
    const bool inside = exists(row + step);
#pragma unroll 1
    for (int group = 0; group < Tile::kChunks; group += kGroup) {
      const uint32_t address = to + step * Tile::kRowBytes + group * 16;
      const int left = inside ? columns - 8 * (chunk + group) : 0;
      if (!kMayBeUnaligned || aligned) {
        cp_async_16_or_zeros(address, left > 0 ? from + 8 * group : source, left > 0);
      } else {
        store_unaligned_piece(address, from + 8 * group, left);
      }
    }
  }
}

}  // namespace flash_attn::cuda::sm80
