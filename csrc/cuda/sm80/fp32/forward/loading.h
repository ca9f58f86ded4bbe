// ForwardBlock: tiles of Q, K and V on their way to shared memory.
#pragma once

#include "../tiles.h"
#include "block.h"

namespace flash_attn::cuda::sm80::fp32 {

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::load_q() const {
  const __half* const source =
      params.q.head_data(is_packed_q(), tile.batch, tile.sequence.q_row + tile.m_begin, tile.head);
  const int rows = int(tile.sequence.seqlen_q) - tile.m_begin;
  load_rows<typename Config::QueryTile, kBlockM, Config::kLoaded, Config::kThreads>(
      q_tile(), source, threadIdx.x, rows >= kBlockM, [rows](int row) { return row < rows; });
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::load_next(uint32_t slot, bool load_k) {
  constexpr int kColumns = 2 * Config::kHeadDim;
  if (load_block >= tile.block_begin) {
    const int first = load_block * kBlockN;
    const __half* const source = (load_k ? tile.k_source : tile.v_source) + int64_t{first} * kColumns;
    const int begin = tile.col_begin - first, end = tile.col_end - first;
    load_rows<typename Config::KeyTile, kBlockN, Config::kLoaded, Config::kThreads>(
        slot, source, fresh_thread(load_block), begin <= 0 && end >= kBlockN,
        [=](int row) { return row >= begin && row < end; });
  }
  if (!load_k) load_block = visited_block(load_block - 1);
  cp_async_commit();
}

}  // namespace flash_attn::cuda::sm80::fp32
