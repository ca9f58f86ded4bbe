// What dropout keeps of a tile of scores, for kernels whose threads have single scores.
#pragma once

#include "../../../philox.h"

namespace flash_attn::cuda {

/// keep (kRows, kCols / 4): of four neighbouring columns a byte's lower bits, of the tile from (row, col) on, which are
/// multiples of 16. kThreads threads call it, and share the groups out.
template <int kRows, int kCols, int kThreads>
__device__ __forceinline__ void draw_fours(const Dropout& dropout, int64_t batch_head, int64_t row, int64_t col,
                                           uint8_t* keep) {
  constexpr int kBlock = Dropout::kBlock, kAcross = kCols / kBlock * 2;  // groups side by side
  static_assert(kRows % kBlock == 0 && kCols % kBlock == 0);
#pragma unroll 1
  for (int n = int(threadIdx.x); n < kRows / kBlock * 4 * kAcross; n += kThreads) {
    const int down = n / kAcross, across = n % kAcross;
    const int m = down / 4 * kBlock + down % 4 * 2, at = across / 2 * kBlock + across % 2 * 4;  // its first score
    const uint32_t kept = dropout.draw<true>(batch_head, row + m, col + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = i % 2 + i / 2 % 2 * 8, c = i / 4 * 8;
      keep[(m + r) * (kCols / 4) + (at + c) / 4] = uint8_t(Dropout::four_of(kept, r, c));
    }
  }
}

}  // namespace flash_attn::cuda
