// ForwardBlock: tiles of Q, K and V on their way to shared memory.
#pragma once

#include "block.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::load_q() {
  const Element* source = static_cast<const Element*>(p.q.data) + tile.batch_offset(p.q, p.cu_seqlens_q != nullptr) +
                          int64_t{tile.head} * p.q.head + (tile.sequence.q_row + tile.m_begin) * p.q.row;
  const int rows = int(tile.sequence.seqlen_q) - tile.m_begin;
  load_tile<kBlockM, Config::kHeadDim, Config::kThreads, kExtended>(threadIdx.x, q_tile(), source, p.q.row,
                                                                    int(p.head_dim), params.aligned, rows >= kBlockM,
                                                                    [rows](int row) { return row < rows; });
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::begin_loads() {
  if constexpr (kPointers) {
    const int row = load_block * kBlockN + KvCopy::row(threadIdx.x), chunk = KvCopy::chunk(threadIdx.x);
    k_from = tile.k + 2 * row * p.k.row + 16 * chunk;
    v_from = tile.v + 2 * row * p.v.row + 16 * chunk;
  }
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::copy_part(uint32_t slot, const char* from, int64_t step, int columns) const {
  const uint32_t thread = fresh_thread(load_block), to = slot + KvCopy::offset(thread);
  const int key = load_block * kBlockN + KvCopy::row(thread), left = columns - 8 * KvCopy::chunk(thread);
  KvCopy::template copy_part<4>(to, from, step, left,
                                [&](int row) { return key + row >= tile.col_begin && key + row < tile.col_end; });
}

template <typename Config>
template <bool kOfK>
SM80_DEVICE void ForwardBlock<Config>::load_next(uint32_t slot) {
  if (load_block >= block_begin()) {
    if constexpr (!kPointers) {
      load_part<kOfK>(slot);
    } else {
      const char*& from = kOfK ? k_from : v_from;
      const bool whole = uint32_t(load_block - tile.whole_begin) < uint32_t(tile.whole_count);
      const int columns = int(kOfK ? p.head_dim : p.head_dim_v);
      const int64_t step = kOfK ? params.k_copy_step : params.v_copy_step;
      if (whole && columns == Config::kHeadDim) {
        const uint32_t thread = Config::kFewRegisters ? fresh_thread(load_block) : threadIdx.x;
        KvCopy::copy(slot + KvCopy::offset(thread), from, step);
      } else {
        copy_part(slot, from, step, columns);
      }
      from -= kOfK ? params.k_tile_step : params.v_tile_step;
    }
  }
  if (!kOfK) load_block = visited_block(load_block - 1);
  cp_async_commit();
}

template <typename Config>
template <bool kOfK>
SM80_DEVICE void ForwardBlock<Config>::load_part(uint32_t slot) const {
  const TensorView& view = kOfK ? p.k : p.v;
  const int first = load_block * kBlockN, begin = tile.col_begin - first, end = tile.col_end - first;
  [[maybe_unused]] bool all = begin <= 0 && end >= kBlockN;
  uint64_t exist[kSeenWords] = {};
  if constexpr (kMasks) {
    if ((kMask || has_seen()) && !kOfK) {
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
  const auto exists = [&](int row) {
    bool there = row >= begin && row < end;
    if constexpr (kMasks) {
      const uint64_t word = kSeenWords == 1 || row < 64 ? exist[0] : exist[kSeenWords - 1];
      there = there && (word >> (row % 64) & 1) != 0;
    }
    return there;
  };
  const char* const source = kOfK ? tile.k : tile.v;
  const int columns = int(kOfK ? p.head_dim : p.head_dim_v);
  const uint32_t thread = fresh_thread(load_block);
  if constexpr (kExtended) {
    load_tile<kBlockN, Config::kHeadDim, Config::kThreads, true>(
        thread, slot, reinterpret_cast<const Element*>(source) + first * view.row, view.row, columns, params.aligned,
        all, exists);
  } else {
    const uint32_t row = uint32_t(KvCopy::row(thread)), chunk = uint32_t(KvCopy::chunk(thread));
    const char* const from = source +
                             uint64_t{uint32_t(load_block)} * (kOfK ? params.k_tile_step : params.v_tile_step) +
                             (2 * uint64_t{row} * view.row + 16 * chunk);
    const int64_t step = kOfK ? params.k_copy_step : params.v_copy_step;
    if (all && columns == Config::kHeadDim) {
      KvCopy::copy(slot + KvCopy::offset(thread), from, step);
    } else {
      KvCopy::template copy_part<KvCopy::kRowsAtOnce>(slot + KvCopy::offset(thread), from, step,
                                                      columns - 8 * int(chunk),
                                                      [&](int further) { return exists(int(row) + further); });
    }
  }
}

}  // namespace flash_attn::cuda::sm80
