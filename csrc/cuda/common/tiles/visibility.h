// Who sees whom, in the 32 bits in which kernels count, for the tiles of one sequence and one head: which rows and
// columns a tile has to do with, which of its blocks need no mask, and how many tiles come before one. The rules
// themselves, in 64 bits, are those of sequence.h. A kernel asks here and nowhere else, so that what takes away more
// (tiles of a mask) is a change of this file.
#pragma once

#include <algorithm>

#include "../../../sequence.h"

namespace flash_attn::cuda {

/// No bound. A quarter of the 32-bit range, so that sums and differences of rows and bounds stay in 32 bits.
constexpr int kUnbounded = 1 << 30;

// As instructions of their own on the device, where a comparison and a choice would be two.
#ifdef __CUDACC__
FLASH_ATTN_HOST_DEVICE int lesser(int a, int b) { return min(a, b); }
FLASH_ATTN_HOST_DEVICE int greater(int a, int b) { return max(a, b); }
#else
inline int lesser(int a, int b) { return std::min(a, b); }
inline int greater(int a, int b) { return std::max(a, b); }
#endif

/// Half-open range of rows, columns or blocks.
struct IntRange {
  int begin, end;
  FLASH_ATTN_HOST_DEVICE bool empty() const { return begin >= end; }
  FLASH_ATTN_HOST_DEVICE bool holds(int i) const { return i >= begin && i < end; }
};

/// Where windows end: row r sees columns [r + left_bound, r + right_bound]. `diagonal` as in SequenceInfo, of the first
/// column if columns count from another one. A window of -1 is unlimited.
FLASH_ATTN_HOST_DEVICE int right_bound(int64_t window_right, int64_t diagonal) {
  return window_right < 0 ? kUnbounded
                          : static_cast<int>(clamp<int64_t>(diagonal + window_right, -kUnbounded, kUnbounded));
}
FLASH_ATTN_HOST_DEVICE int left_bound(int64_t window_left, int64_t diagonal) {
  return window_left < 0 ? -kUnbounded
                         : static_cast<int>(clamp<int64_t>(diagonal - window_left, -kUnbounded, kUnbounded));
}
// The same of windows and lengths that the host has limited.
FLASH_ATTN_HOST_DEVICE int right_bound(int window_right, int diagonal) {
  return window_right < 0 ? kUnbounded : diagonal + window_right;
}
FLASH_ATTN_HOST_DEVICE int left_bound(int window_left, int diagonal) {
  return window_left < 0 ? -kUnbounded : diagonal - window_left;
}

/// What rows see of columns [0, seqlen_k).
struct Band {
  int right, left;         // bounds
  int seqlen_k, seqlen_q;  // columns and rows from here on take no part

  /// The first and the last column that a row sees, if it sees one.
  FLASH_ATTN_HOST_DEVICE int first_column(int row) const { return greater(0, row + left); }
  FLASH_ATTN_HOST_DEVICE int last_column(int row) const { return lesser(seqlen_k - 1, row + right); }
  /// The first row that sees a column, if one does.
  FLASH_ATTN_HOST_DEVICE int first_row(int column) const { return greater(0, column - right); }

  /// Blocks of rows one of which sees one of the columns [begin, end): the others are skipped.
  template <int kBlockM>
  FLASH_ATTN_HOST_DEVICE IntRange row_blocks(int begin, int end) const {
    const int row_begin = first_row(begin), row_end = lesser(seqlen_q, lesser(end, seqlen_k) - left);
    const bool seen = begin < seqlen_k && row_begin < row_end;
    return {seen ? row_begin / kBlockM : 0, seen ? (row_end + kBlockM - 1) / kBlockM : 0};
  }

  /// Blocks of rows all of which see all of the 64 columns from `begin` on: the others are partial. Rows past the end
  /// are told by their statistics.
  template <int kBlockM>
  FLASH_ATTN_HOST_DEVICE IntRange full_row_blocks(int begin) const {
    if (begin + 64 > seqlen_k) return {0, 0};
    const int first_row = begin + 63 - right, last_row_end = begin - left + 1;
    return {first_row <= 0 ? 0 : (first_row + kBlockM - 1) / kBlockM, last_row_end < 0 ? 0 : last_row_end / kBlockM};
  }

  /// Of the tiles of kBlockN columns that rows from row_begin on see, those left of this one.
  template <int kBlockN>
  FLASH_ATTN_HOST_DEVICE int tiles_left_of(int n_block, int row_begin) const {
    return n_block - first_column(row_begin) / kBlockN;
  }
  /// Of those that rows before row_end see, those right of it.
  template <int kBlockN>
  FLASH_ATTN_HOST_DEVICE int tiles_right_of(int n_block, int row_end) const {
    return last_column(lesser(row_end, seqlen_q) - 1) / kBlockN - n_block;
  }
};

/// Blocks of columns that some of 64 rows see, never none, and those of them that all see whole.
struct ColumnBlocks {
  int begin, end, full_begin, full_end;
  FLASH_ATTN_HOST_DEVICE bool is_partial(int n_block) const { return n_block >= full_end || n_block < full_begin; }
};

/// Of the 64 rows from `row` on; kMasked: there are bounds. A tile has num_blocks.
template <int kBlockN, bool kMasked>
FLASH_ATTN_HOST_DEVICE ColumnBlocks column_blocks(const Band& band, int row, int num_blocks) {
  ColumnBlocks blocks{0, num_blocks, 0, band.seqlen_k / kBlockN};
  if constexpr (kMasked) {
    const int first_row_end = row + band.right + 1, last_row_end = first_row_end + 63;
    const int first_row_begin = row + band.left, last_row_begin = first_row_begin + 63;
    blocks.end = clamp((last_row_end + kBlockN - 1) / kBlockN, 1, num_blocks);
    blocks.begin = clamp(first_row_begin / kBlockN, 0, blocks.end - 1);
    blocks.full_end = lesser(blocks.full_end, first_row_end / kBlockN);
    blocks.full_begin = (last_row_begin + kBlockN - 1) / kBlockN;
  }
  return blocks;
}

// ---- for planners

/// Whether later rows see more: causal attention, also with a window to the right.
inline bool rows_see_prefixes(const ForwardParams& p) { return p.window_right >= 0 && p.window_left < 0; }

/// Whether every row of a dense problem sees the first key.
inline bool every_row_sees_first_key(const ForwardParams& p) {
  return p.window_left < 0 && !visible_columns(p, sequence_info(p, 0), 0).empty();
}

/// Tiles of a dense problem's head, block_m rows by block_n columns, in which something is seen.
inline int64_t num_visible_tiles(const ForwardParams& p, int64_t block_m, int64_t block_n) {
  const SequenceInfo info = sequence_info(p, 0);
  int64_t tiles = 0;
  for (int64_t row = 0; row < p.seqlen_q; row += block_m) {
    const Range seen = visible_columns(p, info, row, std::min(row + block_m, p.seqlen_q));
    if (!seen.empty()) tiles += ceil_div(seen.end, block_n) - seen.begin / block_n;
  }
  return tiles;
}

}  // namespace flash_attn::cuda
