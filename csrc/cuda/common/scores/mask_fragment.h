// Masks on fragments (fragment.h): what rows do not see of a block (tiles/visibility.h) goes.
#pragma once

#include "../tiles/visibility.h"
#include "fragment.h"

namespace flash_attn::cuda {

/// Scores S, 64 rows by kBlockN columns of a block that ColumnBlocks calls partial: -inf where the row does not see the
/// column. `row`, `col`: of the thread's accumulator 0. kMasked: there are bounds.
template <bool kMasked, int kSize>
FLASH_ATTN_DEVICE void mask_scores(float (&s)[kSize], const Band& band, const ColumnBlocks& blocks, int n_block,
                                   int row, int col) {
  if (n_block >= blocks.full_end) {
    const int end = band.seqlen_k - 1 - col, seen = row + band.right - col;
    const int last[2] = {kMasked ? min(end, seen) : end, kMasked ? min(end, seen + 8) : end};
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (8 * (i / 4) + i % 2 > last[i / 2 % 2]) s[i] = -INFINITY;
    }
  }
  if (kMasked && n_block < blocks.full_begin) {
    const int first = row + band.left - col;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (8 * (i / 4) + i % 2 < first + i / 2 % 2 * 8) s[i] = -INFINITY;
    }
  }
}

/// Probabilities P^T, key rows by query rows: 0 where the query row does not see the key row. `key`, `query`: rows of
/// the thread's accumulator 0. `band`: a Band, or what has its fields in shared memory, which are read here then.
template <int kSize, typename Band>
FLASH_ATTN_DEVICE void mask_transposed(float (&p)[kSize], const Band& band, int key, int query) {
  // left <= key - query <= right, as one unsigned comparison; a key row that takes no part fails it.
  const uint32_t span = band.right - band.left;
  int distance[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = key + 8 * r;
    distance[r] = row < band.seqlen_k ? row - query - band.left : -kUnbounded;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (static_cast<uint32_t>(distance[i / 2 % 2] - (8 * (i / 4) + i % 2)) > span) p[i] = 0.f;
  }
}

}  // namespace flash_attn::cuda
