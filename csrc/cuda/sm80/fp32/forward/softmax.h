// Online softmax over tiles of keys (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018) on the
// accumulator fragments of one warp.
#pragma once

#include <cmath>

#include "../../softmax.h"

namespace flash_attn::cuda::sm80::fp32 {

/// Unlike sm80::OnlineSoftmax, row_max is the maximum, and a difference to it is taken before it is scaled: P, which
/// becomes fp16 times 2^15, is never above 1, however large scores are, and exact to a few ulp.
template <int kMTiles, int kNTiles>
struct OnlineSoftmax {
  const float scale_log2;     // from scores to powers of 2
  float row_max[kMTiles][2];  // -inf: the row has seen nothing
  float row_sum[kMTiles][2];  // of P, this lane's columns

  SM80_DEVICE explicit OnlineSoftmax(float scale) : scale_log2(scale * kLog2E) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) row_max[m][r] = -INFINITY, row_sum[m][r] = 0.f;
    }
  }

  /// s, of which a score is `unit` times as much (a power of two), becomes P. True: some row of the warp has a new
  /// maximum, and what has been summed up is to be multiplied by `factor`.
  SM80_DEVICE bool advance(float (&s)[kMTiles][kNTiles][4], float unit, float (&factor)[kMTiles][2]) {
    bool grown = false;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < kNTiles; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
        const float high = fmaxf(row_max[m][r], quad_max(x) * unit);
        const float base = high == -INFINITY ? 0.f : high;
        grown = grown || high > row_max[m][r];
        factor[m][r] = fast_exp2((row_max[m][r] - base) * scale_log2);
        row_max[m][r] = high;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& p = s[m][n][2 * r + c];
            p = fast_exp2(fmaf(p, unit, -base) * scale_log2);  // p * unit is exact
            sum += p;
          }
        }
        row_sum[m][r] = fmaf(row_sum[m][r], factor[m][r], sum);
      }
    }
    return __any_sync(~0u, grown);
  }

  /// Of one row, after the last tile: what O is to be multiplied by, and lse. `sink` joins the sum; -inf is none.
  SM80_DEVICE float finish(int m, int r, float scale, float sink, float& lse) const {
    float sum = quad_sum(row_sum[m][r]), high = row_max[m][r] * scale, correction = 1.f;
    if (sink != -INFINITY) {
      const float top = fmaxf(high, sink);
      correction = high == -INFINITY ? 0.f : fast_exp2((high - top) * kLog2E);
      sum = fmaf(sum, correction, fast_exp2((sink - top) * kLog2E));
      high = top;
    }
    const bool empty = !(sum > 0.f) && !(sum != sum);
    lse = empty ? -INFINITY : high + logf(sum);
    return empty ? 0.f : correction / sum;
  }
};

}  // namespace flash_attn::cuda::sm80::fp32
