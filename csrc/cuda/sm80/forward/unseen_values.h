// ForwardBlock: rows of V that attn_mask hides from a whole tile.
#pragma once

#include "block.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::find_seen_columns(SeenColumns& columns) const {
  if (p.mask.data == nullptr || has_seen()) return;
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      bool any = false;
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) any = any || s[m][n][c] != -INFINITY || s[m][n][2 + c] != -INFINITY;
      if (n % 16 == 0 && c == 0) columns[n / 16] = 0;
      columns[n / 16] |= uint32_t(any) << (2 * (n % 16) + c);
    }
  }
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::clear_unseen_v(const SeenColumns& columns, int phase, uint32_t v_slot) {
  uint32_t* const words = alive + phase * 16;  // [lane % 4][n / 16]
#pragma unroll
  for (int w = 0; w < (kNTiles + 15) / 16; ++w) {
    uint32_t x = columns[w];
    x |= __shfl_xor_sync(~0u, x, 4);
    x |= __shfl_xor_sync(~0u, x, 8);
    x |= __shfl_xor_sync(~0u, x, 16);
    if (lane < 4) atomicOr(words + 2 * lane + w, x << (warp_key() / 4));
  }
  __syncthreads();  // all warps have said what they see
  for (int row = warp; row < kBlockN; row += Config::kWarps) {
    const int n = row / 8, t = row % 8 / 2;
    if ((words[2 * t + n / 16] >> (2 * (n % 16) + row % 2) & 1) != 0) continue;
    for (int chunk = lane; chunk < Tile::kChunks; chunk += 32) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(v_slot + Tile::offset(row, chunk)), "r"(0)
                   : "memory");
    }
  }
  // The other phase's words, which everybody has read, for the next time.
  if (threadIdx.x < 16) alive[(phase ^ 1) * 16 + threadIdx.x] = 0;
  __syncthreads();  // V is clean
}

}  // namespace flash_attn::cuda::sm80
