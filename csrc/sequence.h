// Where a sequence lies in memory, and which scores of it exist: every read of a length, and every rule that turns
// causal, window and lengths into ranges of rows and columns, stands here, once for all kernels.
#pragma once

#include <algorithm>

#include "host_device.h"
#include "params.h"

namespace flash_attn {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
FLASH_ATTN_HOST_DEVICE T clamp(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);
}

/// Sequence b of the batch. Lengths that come from device memory are clamped to the tensors, so that a wrong one reads
/// nothing out of bounds.
struct SequenceInfo {
  int64_t q_row, k_row;        // first row in q (out, dq, dout) and in k and v, to be multiplied by the row stride
  int64_t seqlen_q, seqlen_k;  // rows that take part
  int64_t seqlen_q_padded;     // rows that belong to the sequence: those beyond seqlen_q are written as 0
  int64_t seqlen_k_padded;
  int64_t diagonal;  // query row i stands at key column i + diagonal: for causal, window and ALiBi
};

FLASH_ATTN_HOST_DEVICE SequenceInfo sequence_info(const ForwardParams& p, int64_t b) {
  SequenceInfo s;
  s.q_row = s.k_row = 0;
  s.seqlen_q = p.seqlen_q;
  s.seqlen_k = p.seqlen_k;
  if (p.cu_seqlens_q != nullptr) {
    s.q_row = clamp<int64_t>(p.cu_seqlens_q[b], 0, p.total_q);
    s.seqlen_q = clamp<int64_t>(p.cu_seqlens_q[b + 1], s.q_row, p.total_q) - s.q_row;
    if (s.seqlen_q > p.seqlen_q) s.seqlen_q = p.seqlen_q;
  }
  if (p.cu_seqlens_k != nullptr) {
    s.k_row = clamp<int64_t>(p.cu_seqlens_k[b], 0, p.total_k);
    s.seqlen_k = clamp<int64_t>(p.cu_seqlens_k[b + 1], s.k_row, p.total_k) - s.k_row;
    if (s.seqlen_k > p.seqlen_k) s.seqlen_k = p.seqlen_k;
  }
  s.seqlen_q_padded = s.seqlen_q;
  s.seqlen_k_padded = s.seqlen_k;
  if (p.seqused_q != nullptr) s.seqlen_q = clamp<int64_t>(p.seqused_q[b], 0, s.seqlen_q);
  if (p.seqused_k != nullptr) s.seqlen_k = clamp<int64_t>(p.seqused_k[b], 0, s.seqlen_k);
  s.diagonal = p.causal == Causal::kTopLeft ? 0 : s.seqlen_k - s.seqlen_q;
  return s;
}

/// The same where k and v may be a cache: for the kernels that take one.
FLASH_ATTN_HOST_DEVICE SequenceInfo cached_sequence_info(const ForwardParams& p, int64_t b) {
  SequenceInfo s = sequence_info(p, b);
  if (p.cache.appended > 0 && p.seqused_k != nullptr) {
    s.seqlen_k = clamp<int64_t>(p.seqused_k[b] + p.cache.appended, 0, s.seqlen_k_padded);
  }
  if (p.cache.first != nullptr) {
    s.k_row = clamp<int64_t>(p.cache.first[b], 0, s.seqlen_k);
    s.seqlen_k -= s.k_row;
  }
  s.diagonal = p.causal == Causal::kTopLeft ? 0 : s.seqlen_k - s.seqlen_q;
  return s;
}

/// Where the rows of a sequence lie in a cache. Entries that come from device memory are clamped to the cache.
struct KeyRows {
  const int32_t* pages;  // null: rows follow each other
  int64_t entry, entries, page_size;

  /// Elements from the start of k or v to row `row`, of the first head.
  FLASH_ATTN_HOST_DEVICE int64_t offset(const TensorView& view, int64_t row) const {
    if (pages == nullptr) return entry * view.batch + row * view.row;
    return clamp<int64_t>(pages[row / page_size], 0, entries - 1) * view.batch + row % page_size * view.row;
  }
};

FLASH_ATTN_HOST_DEVICE KeyRows key_rows(const CacheView& cache, int64_t b) {
  KeyRows rows{nullptr, b, cache.entries, cache.page_size};
  if (cache.batch_index != nullptr) rows.entry = clamp<int64_t>(cache.batch_index[b], 0, cache.entries - 1);
  if (cache.block_table != nullptr) rows.pages = cache.block_table + b * cache.table_stride;
  return rows;
}

/// Half-open range of rows or columns.
struct Range {
  int64_t begin, end;
  FLASH_ATTN_HOST_DEVICE bool empty() const { return begin >= end; }
};

/// Columns that query row `row` may see by causal, window and lengths (attn_mask may take away more).
FLASH_ATTN_HOST_DEVICE Range visible_columns(const ForwardParams& p, const SequenceInfo& s, int64_t row) {
  const int64_t at = row + s.diagonal;
  Range r{0, s.seqlen_k};
  if (p.window_left >= 0 && at - p.window_left > r.begin) r.begin = at - p.window_left;
  if (p.window_right >= 0 && at + p.window_right + 1 < r.end) r.end = at + p.window_right + 1;
  return r;
}

/// Columns that at least one of the rows [row_begin, row_end) may see; row_begin < row_end.
FLASH_ATTN_HOST_DEVICE Range visible_columns(const ForwardParams& p, const SequenceInfo& s, int64_t row_begin,
                                             int64_t row_end) {
  return {visible_columns(p, s, row_begin).begin, visible_columns(p, s, row_end - 1).end};
}

/// Query rows that may see at least one of the columns [col_begin, col_end); col_begin < col_end.
FLASH_ATTN_HOST_DEVICE Range visible_rows(const ForwardParams& p, const SequenceInfo& s, int64_t col_begin,
                                          int64_t col_end) {
  Range r{0, s.seqlen_q};
  // col <= row + diagonal + window_right, and col >= row + diagonal - window_left
  if (p.window_right >= 0 && col_begin - s.diagonal - p.window_right > r.begin) {
    r.begin = col_begin - s.diagonal - p.window_right;
  }
  if (p.window_left >= 0 && col_end - s.diagonal + p.window_left < r.end) r.end = col_end - s.diagonal + p.window_left;
  return r;
}

/// The problem as the host knows it, for planners: all sequences alike, no length on the device.
inline ForwardParams mean_problem(ForwardParams p) {
  if (p.is_varlen_q()) p.seqlen_q = std::max<int64_t>(1, p.total_q / p.batch);
  if (p.is_varlen_k()) p.seqlen_k = std::max<int64_t>(1, p.total_k / p.batch);
  p.cu_seqlens_q = p.cu_seqlens_k = p.seqused_q = p.seqused_k = nullptr;
  return p;
}

}  // namespace flash_attn
