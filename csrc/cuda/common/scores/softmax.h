// Online softmax over the blocks of a tile (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018),
// for a thread's two rows of the accumulator fragment S (see fragment.h).
#pragma once

#include <cfloat>
#include <cmath>

#include "fragment.h"

namespace flash_attn::cuda {

/// Largest maximum, in log2, that the fma which scales a score subtracts as well: it rounds the maximum, and all P of
/// the row change alike, by up to 2^-12. From larger ones the difference is taken first, which is exact where P is not
/// 0: beyond 2^24 rounding alone would be a factor of 2, and more than float32 holds beyond 2^31.
constexpr float kLargestInLog2 = 0x1p12f;

/// Natural logarithm of sum * e^(row_max to_natural).
FLASH_ATTN_DEVICE float log_sum_exp(float row_max, float to_natural, float sum) {
  return fmaf(row_max, to_natural, __log2f(sum) * 0.69314718f);
}

/// After each block: P = exp(scale (S - row_max)), in place of S, and row_sum is the sum of this thread's P so far.
///
/// row_max is a reference, not always the maximum: it moves, and what has been summed is rescaled, only when a row's
/// maximum has grown by 2^kGrowth. Results are the same, for P is relative to whatever row_max is; rescaling O costs
/// tensor-core time. A growth of 2^8 would not be slower, but the largest P is exact in 16 bits only when it is 1:
/// benchmarks/experiments/011.
///
/// Usual blocks pay nothing for maxima beyond kLargestInLog2: the base of such a row is NaN, which no test passes, so
/// that its blocks take the way of those that have grown (benchmarks/experiments/130).
template <int kBlockN>
struct OnlineSoftmax {
  static constexpr int kSize = kBlockN / 2;
  static constexpr float kGrowth = 4.f;
  // Of a lazy block's sum over a thread's kSize / 2 columns. Equal scores give kSize / 2, and a row's first block may
  // have shown it few columns: not much lower; the larger it is, the less exact are P far above 1:
  // benchmarks/experiments/012.
  static constexpr float kLazyLimit = 128.f;

  const float scale_log2;  // softmax_scale / ln 2
  float row_max[2];        // -inf: the row has seen nothing
  float base[2];           // row_max in log2, lower than any score's where nothing was seen; NaN: too large for that
  float row_sum[2];
  float rescale[2];    // of O and row_sum, when `grown`
  bool grown = false;  // the same in all lanes of the warp

  FLASH_ATTN_DEVICE OnlineSoftmax(float scale) : scale_log2(scale) {}

  /// A tile's first block.
  FLASH_ATTN_DEVICE void start(float (&s)[kSize]) {
    thread_max(s, row_max);
    quad_max(row_max);
    find_bases();
    grown = false;
    float sum[2], less[2] = {base[0], base[1]};
    if (some_base_is_nan()) subtract_maxima(s, less);
    exponentials(s, less, sum);
    row_sum[0] = sum[0];
    row_sum[1] = sum[1];
  }

  /// A later block.
  FLASH_ATTN_DEVICE void advance(float (&s)[kSize]) {
    float largest[2], sum[2];
    thread_max(s, largest);
    grown = __any_sync(~0u, !(fmaf(largest[0], scale_log2, -base[0]) <= kGrowth) |
                                !(fmaf(largest[1], scale_log2, -base[1]) <= kGrowth));
    float less[2];
    if (grown) {
      quad_max(largest);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        largest[r] = fmaxf(row_max[r], largest[r]);
        // A row that has seen nothing has nothing to rescale.
        rescale[r] = largest[r] == -INFINITY ? 1.f : fast_exp2((row_max[r] - largest[r]) * scale_log2);
        row_max[r] = largest[r];
        row_sum[r] *= rescale[r];
      }
      find_bases();
      less[0] = base[0], less[1] = base[1];
      if (some_base_is_nan()) subtract_maxima(s, less);
    } else {
      less[0] = base[0], less[1] = base[1];
    }
    exponentials(s, less, sum);
    row_sum[0] += sum[0];
    row_sum[1] += sum[1];
  }

  /// A later block without looking for its maximum. False: some P is too far above 1, or NaN, S is lost, nothing else
  /// has changed; compute S again and call advance(). The whole warpgroup agrees, because S is a product of all its
  /// warps.
  FLASH_ATTN_DEVICE bool advance_lazily(float (&s)[kSize], int vote_barrier) {
    float sum[2];
    exponentials(s, base, sum);
    if (named_barrier_any(vote_barrier, 128, !(fmaxf(sum[0], sum[1]) <= kLazyLimit))) return false;
    row_sum[0] += sum[0];
    row_sum[1] += sum[1];
    grown = false;
    return true;
  }

 private:
  static FLASH_ATTN_DEVICE void thread_max(const float (&s)[kSize], float (&largest)[2]) {
    largest[0] = s[0];
    largest[1] = s[2];
#pragma unroll
    for (int i = 0; i < kSize; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], s[i]);
  }
  static FLASH_ATTN_DEVICE void quad_max(float (&x)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      x[r] = fmaxf(x[r], __shfl_xor_sync(~0u, x[r], 1));
      x[r] = fmaxf(x[r], __shfl_xor_sync(~0u, x[r], 2));
    }
  }
  FLASH_ATTN_DEVICE void find_bases() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      base[r] = row_max[r] * scale_log2;
      if (fabsf(base[r]) > kLargestInLog2) base[r] = row_max[r] == -INFINITY ? -FLT_MAX : NAN;
    }
  }
  FLASH_ATTN_DEVICE bool some_base_is_nan() const { return __any_sync(~0u, base[0] != base[0] || base[1] != base[1]); }
  /// For all rows of the warp. Nothing is left to subtract in log2.
  FLASH_ATTN_DEVICE void subtract_maxima(float (&s)[kSize], float (&less)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) less[r] = row_max[r] == -INFINITY ? 0.f : row_max[r];
#pragma unroll
    for (int i = 0; i < kSize; ++i) s[i] -= less[i / 2 % 2];
    less[0] = less[1] = 0.f;
  }
  FLASH_ATTN_DEVICE void exponentials(float (&s)[kSize], const float (&less)[2], float (&sum)[2]) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) s[i] = fast_exp2(fmaf(s[i], scale_log2, -less[i / 2 % 2]));
    float partial[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int i = 4; i < kSize; ++i) partial[i % 4] += s[i];
    sum[0] = partial[0] + partial[1];
    sum[1] = partial[2] + partial[3];
  }
};

}  // namespace flash_attn::cuda
