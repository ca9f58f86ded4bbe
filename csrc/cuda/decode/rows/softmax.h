// Scores of a warp's 16 rows and kStepKeys keys, and the online softmax over them (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018). Fragments are those of sm80/mma.h: a lane has rows g and g + 8.
#pragma once

#include <cmath>

#include "queries.h"

namespace flash_attn::cuda::decode {

/// O of a lane's two rows: nothing summed up yet.
template <int kTiles>
FLASH_ATTN_DEVICE void clear(float (&o)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) o[i / 4][i % 4] = 0.f;
}

/// What is summed up becomes relative to other maxima.
template <int kTiles>
FLASH_ATTN_DEVICE void rescale(float (&o)[kTiles][4], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) o[i / 4][i % 4] *= factor[i % 4 / 2];
}

/// Probabilities of 16 keys, rounded, as a fragment of a product's left operand.
template <typename Element>
FLASH_ATTN_DEVICE void pack_probabilities(const float (&first)[4], const float (&second)[4], uint32_t (&p)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    p[i] = pack<Element>(first[2 * i], first[2 * i + 1]);
    p[2 + i] = pack<Element>(second[2 * i], second[2 * i + 1]);
  }
}

template <typename C>
struct Softmax {
  static constexpr int kTiles = C::kStepKeys / 8;
  float row_max[2];  // in log2; -inf: nothing seen
  float row_sum[2];  // this lane's columns

  FLASH_ATTN_DEVICE void reset() {
#pragma unroll
    for (int r = 0; r < 2; ++r) row_max[r] = -INFINITY, row_sum[r] = 0.f;
  }

  /// From q.k to scores in log2; `first` is the key of the lane's first column.
  template <bool kUnits>
  FLASH_ATTN_DEVICE static void score(const DecodeParams& params, const TileInfo& t, const LaneRows& rows, int first,
                                      bool partial, float (&s)[kTiles][4]) {
    const ForwardParams& p = params.problem;
    if constexpr (kUnits) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) s[i / 4][i % 4] *= rows.unit[i % 4 / 2];
    }
    if (params.scores_as_they_are) {
      const float scale = float(p.softmax_scale) * sm80::kLog2E;
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) s[i / 4][i % 4] *= scale;
    } else {
      change(p, t, rows, first, s);
    }
    if (!partial) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Keys that the row sees, counted from the lane's first.
      const bool used = rows.query[r] < t.seqlen_q;
      const int begin = max(0, rows.query[r] + t.left) - first;
      const int end = used ? min(t.seqlen_k, rows.query[r] + t.right + 1) - first : begin;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (8 * n + i < begin || 8 * n + i >= end) s[n][2 * r + i] = -INFINITY;
        }
      }
    }
  }

  /// Softcap and ALiBi.
  FLASH_ATTN_DEVICE static void change(const ForwardParams& p, const TileInfo& t, const LaneRows& rows, int first,
                                       float (&s)[kTiles][4]) {
    const bool capped = p.softcap > 0.0;
    const float scale = float(p.softmax_scale) * sm80::kLog2E, cap = float(p.softcap) * sm80::kLog2E;
    const float in_caps = capped ? float(p.softmax_scale / p.softcap) : 0.f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[n][i];
        x = capped ? cap * tanhf(x * in_caps) : x * scale;
        x -= rows.slope[i / 2] * fabsf(float(rows.query[i / 2] + t.diagonal - (first + 8 * n + i % 2)));
      }
    }
  }

  /// Scores become probabilities relative to row_max; true: `factor` is what older sums are to be multiplied by.
  FLASH_ATTN_DEVICE bool update(float (&s)[kTiles][4], float (&factor)[2]) {
    float high[2];
    bool grown = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      high[r] = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
      for (int n = 1; n < kTiles; ++n) high[r] = fmaxf(high[r], fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      high[r] = sm80::quad_max(high[r]);
      grown = grown || high[r] > row_max[r];
    }
    grown = __any_sync(~0u, grown);
    if (grown) move({fmaxf(row_max[0], high[0]), fmaxf(row_max[1], high[1])}, factor);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float base = row_max[r] == -INFINITY ? 0.f : row_max[r];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) row_sum[r] += s[n][i] = sm80::fast_exp2(s[n][i] - base);
      }
    }
    return grown;
  }

  /// What is summed up becomes relative to other maxima.
  FLASH_ATTN_DEVICE void move(float2 high, float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float to = r == 0 ? high.x : high.y;
      factor[r] = to == -INFINITY ? 1.f : sm80::fast_exp2(row_max[r] - to);
      row_max[r] = to;
      row_sum[r] *= factor[r];
    }
  }
};

}  // namespace flash_attn::cuda::decode
