// From q.k to scores where a score is more than scale * q.k: softcap, ALiBi, attn_mask. The same operations in the same
// order in all kernels, so that what rounding errors large scores have cancel between the passes.
//
// Fragments as in ../mma.h: element (m, n, i) of lane 4 g + t stands at row 16 m + g + 8 (i / 2), column
// 8 n + 2 t + i % 2. kOfKeys: rows are keys and columns queries; else the other way round.
#pragma once

#include "../../common/scores/dropout_bits.h"
#include "../../common/scores/scores.h"
#include "../mma.h"

namespace flash_attn::cuda::sm80::fp32 {

/// Of element (0, 0, 0) of a lane, in the sequence.
struct FragmentOrigin {
  int row, column;
};

/// Of one head of one sequence.
template <bool kOfKeys, int kMTiles, int kNTiles>
struct HeadRules {
  using Scores = float[kMTiles][kNTiles][4];

  const MaskView& mask;
  const float* bias;  // attn_mask of row 0, column 0; null: nothing is added
  float scale, softcap, slope;
  int diagonal, rows, columns;  // that exist

  SM80_DEVICE HeadRules(const ForwardParams& p, const SequenceInfo& s, int batch, int head)
      : mask(p.mask),
        bias(nullptr),
        scale(float(p.softmax_scale)),
        softcap(float(p.softcap)),
        slope(0.f),
        diagonal(int(s.diagonal)),
        rows(int(kOfKeys ? s.seqlen_k : s.seqlen_q)),
        columns(int(kOfKeys ? s.seqlen_q : s.seqlen_k)) {
    if (p.alibi_slopes != nullptr) {
      slope =
          static_cast<const float*>(p.alibi_slopes)[batch * p.alibi_batch_stride + int64_t{head} * p.alibi_head_stride];
    }
    if (mask.dtype == DType::kFloat32) {
      bias = static_cast<const float*>(mask.data) + batch * mask.batch + int64_t{head} * mask.head;
    }
  }

  /// s, of which q.k is `unit` times as much (a power of two), becomes scores in natural units to which nothing has
  /// been added.
  SM80_DEVICE void scale_scores(Scores& s, float unit) const {
    const float factor = unit * (softcap > 0.f ? scale / softcap : scale);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int n = 0; n < kNTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] *= factor;
    if (softcap > 0.f) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int n = 0; n < kNTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][n][i] = softcap * tanhf(s[m][n][i]);
    }
  }

  /// Between an element's query and key.
  SM80_DEVICE float distance(const FragmentOrigin& at, int m, int n, int i) const {
    const int row_less_column = at.row - at.column + 16 * m + i / 2 * 8 - 8 * n - i % 2;
    return fabsf(float(diagonal + (kOfKeys ? -row_less_column : row_less_column)));
  }

  SM80_DEVICE float add_slope(float s, float distance) const { return fmaf(-slope, distance, s); }

  /// What attn_mask adds to the two elements of columns n in row i / 2 of m; beyond the sequence, something finite.
  SM80_DEVICE float2 bias_of(const FragmentOrigin& at, int m, int n, int half) const {
    const int row = min(at.row + 16 * m + 8 * half, rows - 1), column = at.column + 8 * n;
    const int64_t row_stride = kOfKeys ? mask.col : mask.row, column_stride = kOfKeys ? mask.row : mask.col;
    const float* const from = bias + row * row_stride;
    return {__ldg(from + min(column, columns - 1) * column_stride),
            __ldg(from + min(column + 1, columns - 1) * column_stride)};
  }

  /// A hidden score becomes -inf whatever it was.
  SM80_DEVICE static float add_bias(float s, float bias) { return bias == -INFINITY ? bias : s + bias; }
};

}  // namespace flash_attn::cuda::sm80::fp32
