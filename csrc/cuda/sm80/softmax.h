// Online softmax over blocks of keys (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018) on the
// accumulator fragments of one warp, kMTiles x kNTiles of 16 x 8.
#pragma once

#include <cmath>

#include "mma.h"

namespace flash_attn::cuda::sm80 {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.69314718055994531f;

/// The four lanes of a quad hold the same rows.
SM80_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
SM80_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

/// For each block: rescale(), which looks at S, then exponentials() of each fragment of S, which becomes P.
///
/// row_max is a reference, not always the maximum: it moves, and what has been summed is rescaled, only when some row's
/// maximum has grown by more than kGrowth. Results are the same, for P is relative to whatever row_max is.
///
/// kNatural: S and row_max are scores in natural units, which may be as low as the smallest float. Else S is q.k, and
/// row_max is in log2, scaled. Either way it is subtracted by the fma that scales; what it loses by being rounded all
/// of a row lose. Beyond kLarge that is too much. Then it is subtracted from the row's S before anything else, which is
/// exact near it; where S is q.k, row_max is q.k itself then, times a power of 2 by which it stays beyond kLarge.
template <int kMTiles, int kNTiles, bool kNatural>
struct OnlineSoftmax {
  static constexpr float kUnit = kNatural ? kLn2 : 1.f, kGrowth = 4.f * kUnit, kLarge = 4096.f * kUnit;

  const float scale;          // from S to row_max's unit: softmax_scale / ln 2, or 1
  float row_max[kMTiles][2];  // -inf: the row has seen nothing
  float row_sum[kMTiles][2];  // of P, this lane's columns
  bool any_large = false;     // some row's of the warp is large

  SM80_DEVICE explicit OnlineSoftmax(float softmax_scale) : scale(kNatural ? 1.f : softmax_scale * kLog2E) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) row_max[m][r] = -INFINITY, row_sum[m][r] = 0.f;
    }
  }

  using RowValues = float[kMTiles][2];

  SM80_DEVICE static bool is_large(float x) { return fabsf(x) > kLarge && x != -INFINITY; }
  /// Of a large row_max.
  SM80_DEVICE float large_unit() const {
    return fmaxf(1.f, 2.f * __uint_as_float(__float_as_uint(scale) & 0xff800000u));
  }

  /// This lane's part of the rows' maxima.
  SM80_DEVICE void find_largest(const float (&s)[kMTiles][kNTiles][4], RowValues& largest) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < kNTiles; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
        largest[m][r] = x;
      }
    }
  }

  /// `rescale_out(m, half, factor)` is called for every row of this lane when some row of the warp has grown.
  template <typename RescaleOut>
  SM80_DEVICE void rescale(float (&s)[kMTiles][kNTiles][4], const RowValues& largest, const RescaleOut& rescale_out) {
    bool grown = any_large;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        grown = grown || largest[m][r] * scale > row_max[m][r] + kGrowth;
      }
    }
    if (!__any_sync(~0u, grown)) return;
    RowValues high;
    bool large = !kNatural && any_large;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        high[m][r] = quad_max(largest[m][r]);
        large = large || is_large(kNatural ? fmaxf(row_max[m][r], high[m][r]) : high[m][r] * scale);
      }
    }
    large = any_large = __any_sync(~0u, large);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& reference = row_max[m][r];
        float factor;
        if (!kNatural && large) {
          factor = take_large(s, m, r, high[m][r]);
        } else {
          const float top = fmaxf(reference, high[m][r] * scale);
          // A row that has seen nothing has nothing to rescale: 0 - 0, not -inf - -inf.
          factor = top == -INFINITY ? 1.f : exponential(reference - top);
          reference = top;
          if (kNatural && large) subtract(s, m, r, is_large(top) ? top : 0.f);
        }
        row_sum[m][r] *= factor;
        rescale_out(m, r, factor);
      }
    }
  }

  /// Of fragment (m, n).
  SM80_DEVICE void exponentials(float (&s)[kMTiles][kNTiles][4], int m, int n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float base = fabsf(row_max[m][r]) <= kLarge ? row_max[m][r] * (kNatural ? kLog2E : 1.f) : 0.f;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = s[m][n][2 * r + c];
        x = fast_exp2(fmaf(x, kNatural ? kLog2E : scale, -base));
      }
      row_sum[m][r] += s[m][n][2 * r] + s[m][n][2 * r + 1];
    }
  }

  /// A row's reference in the unit of S.
  SM80_DEVICE float reference(int m, int r) const {
    return row_max[m][r] / (!kNatural && is_large(row_max[m][r]) ? large_unit() : scale);
  }

  /// Of one row, after the last block, whose P sum up to `sum`: what O is to be multiplied by, and lse. `sink` joins
  /// the sum; -inf is none.
  SM80_DEVICE float finish(int m, int r, float sum, float sink, float& lse) const {
    float high = row_max[m][r], correction = 1.f;
    if (!kNatural) high *= is_large(high) ? scale / large_unit() * kLn2 : kLn2;
    if (sink != -INFINITY) {
      const float top = fmaxf(high, sink);
      correction = high == -INFINITY ? 0.f : exponential_natural(high - top);
      sum = sum * correction + exponential_natural(sink - top);
      high = top;
    }
    const bool empty = !(sum > 0.f) && !(sum != sum);
    lse = empty ? -INFINITY : high + logf(sum);
    return empty ? 0.f : correction / sum;
  }

 private:
  /// Of one row when some row of the warp is large: its reference moves, and its S are made relative to it. Returns
  /// what has been summed is to be multiplied by.
  SM80_DEVICE float take_large(float (&s)[kMTiles][kNTiles][4], int m, int r, float high) {
    float& reference = row_max[m][r];
    const float unit = large_unit();
    float factor = 1.f, shift = 0.f;
    const auto move = [&](float top) {
      const bool large = is_large(top * scale);
      reference = top * (large ? unit : scale);
      shift = large ? top : 0.f;
    };
    if (is_large(reference)) {
      const float old = reference / unit, top = fmaxf(old, high);
      factor = exponential((old - top) * scale);
      move(top);
    } else if (high * scale > reference) {
      factor = exponential(fmaf(-high, scale, reference));
      move(high);
    }
    subtract(s, m, r, shift);
    return factor;
  }
  SM80_DEVICE static void subtract(float (&s)[kMTiles][kNTiles][4], int m, int r, float shift) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) s[m][n][2 * r] -= shift, s[m][n][2 * r + 1] -= shift;
  }

  SM80_DEVICE static float exponential_natural(float x) { return fast_exp2(x * kLog2E); }
  SM80_DEVICE static float exponential(float x) { return fast_exp2(kNatural ? x * kLog2E : x); }
};

}  // namespace flash_attn::cuda::sm80
