// ForwardBlock: tiles of Q, K and V on their way to shared memory.
#pragma once

#include "block.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::load_q() {
  const Element* source = static_cast<const Element*>(p.q.data) + tile.batch_offset(p.q, p.cu_seqlens_q != nullptr) +
                          int64_t{tile.head} * p.q.head + (tile.sequence.q_row + tile.m_begin) * p.q.row;
  const int rows = int(tile.sequence.seqlen_q) - tile.m_begin;
  load_tile<kBlockM, Config::kHeadDim, Config::kThreads, kExtended>(q_tile(), source, p.q.row, int(p.head_dim),
                                                                    params.aligned, rows >= kBlockM,
                                                                    [rows](int row) { return row < rows; });
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::load_next(uint32_t slot, bool load_k) {
  if (load_block >= block_begin()) {
    const int first = load_block * kBlockN;
    const int64_t row_stride = load_k ? p.k.row : p.v.row;
    const Element* const source = kv_source(load_k) + first * row_stride;
    const int begin = tile.col_begin - first, end = tile.col_end - first;
    bool all = begin <= 0 && end >= kBlockN;
    uint64_t exist[kSeenWords] = {};
    if constexpr (kExtended) {
      if (has_seen() && !load_k) {
#pragma unroll
        for (int w = 0; w < kSeenWords; ++w) {
          exist[w] = seen_columns(load_block, w);
          all = all && exist[w] == ~uint64_t{0};
        }
      } else {
#pragma unroll
        for (int w = 0; w < kSeenWords; ++w) exist[w] = ~uint64_t{0};
      }
    }
    load_tile<kBlockN, Config::kHeadDim, Config::kThreads, kExtended>(
        slot, source, row_stride, int(load_k ? p.head_dim : p.head_dim_v), params.aligned, all, [&](int row) {
          bool exists = row >= begin && row < end;
          if constexpr (kExtended) {
            const uint64_t word = kSeenWords == 1 || row < 64 ? exist[0] : exist[kSeenWords - 1];
            exists = exists && (word >> (row % 64) & 1) != 0;
          }
          return exists;
        });
  }
  if (!load_k) load_block = visited_block(load_block - 1);
  cp_async_commit();
}

}  // namespace flash_attn::cuda::sm80
