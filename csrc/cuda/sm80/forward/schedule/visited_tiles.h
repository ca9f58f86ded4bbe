// ForwardBlock: which tiles of keys are visited under attn_mask, those with a column that some row sees.
#pragma once

#include "../block.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
SM80_DEVICE uint64_t ForwardBlock<Config>::find_seen(int col_cell) const {
  const mask::PackedMask& packed = params.packed;
  const int first = tile.m_begin / mask::kCellRows;
  const int count = packed.row_step == 0 ? 1 : min(kBlockM / mask::kCellRows, packed.row_cells - first);
  uint64_t word = 0;
  for (int i = 0; i < count; ++i) {
    word |= packed.seen[packed.cell(tile.batch, tile.head, first + i, min(col_cell, packed.col_cells - 1))];
  }
  return word;
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::fill_seen() {
  const int count = min(params.seen_words, (tile.col_end + 63) / 64 - seen_begin());
  for (int i = int(threadIdx.x); i < count; i += Config::kThreads) seen()[i] = find_seen(seen_begin() + i);
  __syncthreads();  // `seen` is filled
}

template <typename Config>
SM80_DEVICE uint64_t ForwardBlock<Config>::seen_columns(int block, int w) const {
  const int col_cell = block * kBlockN / 64 + w;
  if (col_cell * 64 >= tile.col_end) return 0;
  const int i = col_cell - seen_begin();
  const uint64_t word = Config::kKeepsSeen || i < params.seen_words ? seen()[i] : find_seen(col_cell);
  return kBlockN >= 64 ? word : word >> (block * kBlockN % 64) & ((uint64_t{1} << (kBlockN % 64)) - 1);
}

template <typename Config>
SM80_DEVICE int ForwardBlock<Config>::visited_block(int block) const {
  if constexpr (kMasks) {
    if (!kMask && !has_seen()) return block;
    for (; block >= block_begin(); --block) {
      uint64_t any = 0;
#pragma unroll
      for (int w = 0; w < kSeenWords; ++w) any |= seen_columns(block, w);
      if (any != 0) break;
    }
  }
  return block;
}

}  // namespace flash_attn::cuda::sm80
