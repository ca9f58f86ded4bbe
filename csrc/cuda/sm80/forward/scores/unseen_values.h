// ForwardBlock: rows of V that are hidden from a whole tile.
#pragma once

#include "../block.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
SM80_DEVICE uint32_t ForwardBlock<Config>::columns_of_scores() const {
  const int rows = int(tile.sequence.seqlen_q) - (tile.m_begin + warp_row() + lane / 4);  // that exist, from here on
  uint32_t columns = 0;
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
  return columns;
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::limit_mask_bits(int col) {
  static_assert(kNTiles <= 8);
  const ColumnBounds bounds(p, tile.sequence);
  const FragmentPlace at = place(col);
  uint32_t columns = 0;  // bit 4 n + c
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = at.row + 16 * m + 8 * r;
      const int last = row < int(tile.sequence.seqlen_q) ? min(row + bounds.right, bounds.end - 1) - at.col : -1;
      const int first = row + bounds.left - at.col;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = 8 * n + c;
          if (column > last || column < first) mask_bits.bits[m] &= ~(1u << (4 * n + 2 * r + c));
        }
      }
    }
    columns |= mask_bits.bits[m] | mask_bits.bits[m] >> 2;
  }
  columns &= 0x33333333u >> (32 - 4 * kNTiles);
  columns = (columns | columns >> 2) & 0x0f0f0f0fu;
  columns = (columns | columns >> 4) & 0x00ff00ffu;
  tell_seen_columns((columns | columns >> 8) & 0xffffu);
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::tell_seen_columns(uint32_t columns) const {
  columns |= __shfl_xor_sync(~0u, columns, 4);
  columns |= __shfl_xor_sync(~0u, columns, 8);
  columns |= __shfl_xor_sync(~0u, columns, 16);
  if (lane < 4) alive[4 * warp + lane] = columns << (warp_key() / 4);
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::tell_seen_scores(int block, bool hides) const {
  const bool limited = block * kBlockN < full_begin() || (block + 1) * kBlockN > full_end();
  if (hides || limited || tile.m_begin + warp_row() >= int(tile.sequence.seqlen_q)) {
    tell_seen_columns(columns_of_scores());
  } else if (lane < 4) {
    alive[4 * warp + lane] = kAllOfWarp << (warp_key() / 4);
  }
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::clear_unseen_v(uint32_t v_slot) const {
  uint32_t words[4] = {};
#pragma unroll
  for (int w = 0; w < Config::kWarps; ++w) {
    const uint4 x = reinterpret_cast<const uint4*>(alive)[w];
    words[0] |= x.x, words[1] |= x.y, words[2] |= x.z, words[3] |= x.w;
  }
  if ((words[0] & words[1] & words[2] & words[3]) == kAllColumns) return;
#pragma unroll 1
  for (int row = warp; row < kBlockN; row += Config::kWarps) {
    const uint32_t word = row % 4 < 2 ? (row % 8 < 4 ? words[0] : words[2]) : (row % 8 < 4 ? words[1] : words[3]);
    if ((word >> (2 * (row / 8) + row % 2) & 1) != 0) continue;
#pragma unroll 1
    for (int chunk = lane; chunk < Tile::kChunks; chunk += 32) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(v_slot + Tile::offset(row, chunk)), "r"(0)
                   : "memory");
    }
  }
  __syncthreads();  // V is clean
}

}  // namespace flash_attn::cuda::sm80
