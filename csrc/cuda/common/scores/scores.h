// From q.k to scores, on one warp's accumulator fragments: scale, softcap, ALiBi, attn_mask, causal, window, lengths.
// A fragment's element (m, n, i) of lane 4 g + t stands at row 16 m + g + 8 (i / 2), column 8 n + 2 t + i % 2.
#pragma once

#include <cmath>

#include "../../../params.h"
#include "../../../sequence.h"
#include "../../mask/packed_mask.h"
#include "../ptx.h"
#include "../tiles/visibility.h"
#include "softcap.h"

namespace flash_attn::cuda {

/// Where a warp's fragments stand: of element (0, 0, 0) of this lane, row and column in its sequence.
struct FragmentPlace {
  int row, col;
};

/// Columns that a row sees by causal, window and lengths: row + left <= col <= row + right, and col < end.
struct ColumnBounds {
  int left, right, end;

  FLASH_ATTN_DEVICE ColumnBounds(const ForwardParams& p, const SequenceInfo& s)
      : left(left_bound(p.window_left, s.diagonal)),
        right(right_bound(p.window_right, s.diagonal)),
        end(int(s.seqlen_k)) {}
};

/// -inf where a row does not see a column.
template <int kMTiles, int kNTiles>
FLASH_ATTN_DEVICE void mask_columns(float (&s)[kMTiles][kNTiles][4], const FragmentPlace& at,
                                    const ColumnBounds& bounds) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = at.row + 16 * m + 8 * r;
      const int last = min(row + bounds.right, bounds.end - 1) - at.col, first = row + bounds.left - at.col;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int col = 8 * n + c;
          if (col > last || col < first) s[m][n][2 * r + c] = -INFINITY;
        }
      }
    }
  }
}

/// The rules of one head of one sequence, beyond a scale.
struct ScoreRules {
  float scale, softcap, slope;
  int diagonal;

  FLASH_ATTN_DEVICE ScoreRules(const ForwardParams& p, const SequenceInfo& sequence, int batch, int head)
      : scale(float(p.softmax_scale)), softcap(float(p.softcap)), slope(0.f), diagonal(int(sequence.diagonal)) {
    if (p.alibi_slopes != nullptr) {
      slope =
          static_cast<const float*>(p.alibi_slopes)[batch * p.alibi_batch_stride + int64_t{head} * p.alibi_head_stride];
    }
  }

  /// S becomes scores in natural units, attn_mask excepted.
  template <int kMTiles, int kNTiles>
  FLASH_ATTN_DEVICE void apply(float (&s)[kMTiles][kNTiles][4], const FragmentPlace& at) const {
    if (softcap > 0.f) {
      const float inner = scale / softcap;
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int n = 0; n < kNTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][n][i] = softcap * tanh_by_exp2(s[m][n][i] * inner);
    } else {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int n = 0; n < kNTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][n][i] *= scale;
    }
    if (slope != 0.f) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float distance = float(at.row + 16 * m + 8 * r + diagonal - at.col);
#pragma unroll
          for (int n = 0; n < kNTiles; ++n)
#pragma unroll
            for (int c = 0; c < 2; ++c)
              s[m][n][2 * r + c] = fmaf(-slope, fabsf(distance - float(8 * n + c)), s[m][n][2 * r + c]);
        }
    }
  }
};

FLASH_ATTN_DEVICE float low_half(uint32_t pair, __nv_bfloat16) { return __uint_as_float(pair << 16); }
FLASH_ATTN_DEVICE float high_half(uint32_t pair, __nv_bfloat16) { return __uint_as_float(pair & 0xffff0000u); }
FLASH_ATTN_DEVICE float low_half(uint32_t pair, __half) { return __half2float(__ushort_as_half(uint16_t(pair))); }
FLASH_ATTN_DEVICE float high_half(uint32_t pair, __half) {
  return __half2float(__ushort_as_half(uint16_t(pair >> 16)));
}

/// Whether attn_mask adds something to a score of a warp's tile, see PackedMask::tile_classes. If not, a packed mask's
/// bits say all.
template <int kRows, int kCols>
FLASH_ATTN_DEVICE bool adds_values(const MaskView& view, const mask::PackedMask& packed, int batch, int head, int row,
                                   int col) {
  if (view.dtype == DType::kBool) return false;
  return packed.seen == nullptr || (packed.tile_classes<kRows, kCols>(batch, head, row, col) & mask::kBiased) != 0;
}

/// A packed mask's bits for one warp's fragments, see packed_mask.h.
template <int kMTiles, int kNTiles>
struct MaskFragments {
  uint32_t bits[kMTiles];  // 4 n + i

  /// The lane's word of a cell, or of the last one if it would be beyond that.
  FLASH_ATTN_DEVICE static const uint32_t* word_of(const mask::PackedMask& packed, int batch, int head, int row_cell,
                                                   int col_cell) {
    const int64_t cell =
        packed.cell(batch, head, min(row_cell, packed.row_cells - 1), min(col_cell, packed.col_cells - 1));
    return packed.bits + cell * 32 + threadIdx.x % 32;
  }

  /// `row` and `col` of the warp's first fragment: multiples of 16 and of its width, which divides or is 64.
  FLASH_ATTN_DEVICE void load(const mask::PackedMask& packed, int batch, int head, int row, int col) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      bits[m] = __ldg(word_of(packed, batch, head, row / mask::kCellRows + m, col / mask::kCellCols));
      // Of a whole cell nothing is to be shifted, which would wait for the load.
      if constexpr (8 * kNTiles < mask::kCellCols) bits[m] >>= col % mask::kCellCols / 2;
    }
  }

  FLASH_ATTN_DEVICE void apply(float (&s)[kMTiles][kNTiles][4]) const {
    constexpr uint32_t kAll = kNTiles == 8 ? ~0u : (1u << (4 * kNTiles % 32)) - 1;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      if (__all_sync(~0u, (bits[m] & kAll) == kAll)) continue;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if ((bits[m] >> (4 * n + i) & 1) == 0) s[m][n][i] = -INFINITY;
        }
    }
  }
};

}  // namespace flash_attn::cuda
