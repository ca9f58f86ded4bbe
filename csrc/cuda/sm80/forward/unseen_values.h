// ForwardBlock: rows of V that are hidden from a whole tile.
#pragma once

#include "block.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::tell_seen_columns() const {
  const int rows = int(tile.sequence.seqlen_q) - (tile.m_begin + warp_row() + lane / 4);  // that exist, from here on
  uint32_t columns = 0;  // bit 2 n + c: of column 8 n + 2 (lane % 4) + c
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      bool any = false;
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        any = any || (16 * m < rows && s[m][n][c] != -INFINITY) || (16 * m + 8 < rows && s[m][n][2 + c] != -INFINITY);
      }
      columns |= uint32_t(any) << (2 * n + c);
    }
  }
  columns |= __shfl_xor_sync(~0u, columns, 4);
  columns |= __shfl_xor_sync(~0u, columns, 8);
  columns |= __shfl_xor_sync(~0u, columns, 16);
  if (lane < 4) atomicOr(alive + lane, columns << (warp_key() / 4));
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::clear_unseen_v(uint32_t v_slot) {
  for (int row = warp; row < kBlockN; row += Config::kWarps) {
    if ((alive[row % 8 / 2] >> (2 * (row / 8) + row % 2) & 1) != 0) continue;
    for (int chunk = lane; chunk < Tile::kChunks; chunk += 32) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(v_slot + Tile::offset(row, chunk)), "r"(0)
                   : "memory");
    }
  }
  __syncthreads();                                        // V is clean, and all have read the words
  if (threadIdx.x < kAliveWords) alive[threadIdx.x] = 0;  // for the next time, before which another barrier stands
}

}  // namespace flash_attn::cuda::sm80
