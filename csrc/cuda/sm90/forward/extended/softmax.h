// Online softmax (see common/scores/softmax.h) of scores in natural units, which may be as low as the smallest float,
// or of q.k. Rows may have seen nothing yet.
#pragma once

#include "../../../common/scores/fragment.h"
#include "../../../common/scores/softmax.h"

namespace flash_attn::cuda::sm90::forward {

template <int kBlockN>
struct ScoreSoftmax {
  static constexpr int kSize = kBlockN / 2;
  static constexpr float kGrowth = 4.f;  // in log2: see OnlineSoftmax

  const float to_log2;
  float row_max[2];  // -inf: the row has seen nothing
  float row_sum[2];  // of P, this thread's columns
  float base[2];     // what is subtracted from S in log2
  float rescale[2];  // of O and row_sum, when `grown`
  bool grown;
  bool large;  // some row's maximum is beyond kLargestInLog2

  FLASH_ATTN_DEVICE ScoreSoftmax(float to_log2) : to_log2(to_log2) {}

  FLASH_ATTN_DEVICE void start() {
#pragma unroll
    for (int r = 0; r < 2; ++r) row_max[r] = -INFINITY, row_sum[r] = 0.f, base[r] = 0.f;
    large = false;
  }

  /// S becomes P.
  FLASH_ATTN_DEVICE void advance(float (&s)[kSize]) {
    float largest[2] = {s[0], s[2]};
#pragma unroll
    for (int i = 0; i < kSize; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], s[i]);
    // -inf - -inf is NaN, which has not grown.
    grown = __any_sync(~0u, fmaxf(largest[0] - row_max[0], largest[1] - row_max[1]) * to_log2 > kGrowth);
    if (__builtin_expect(grown, 0)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float high = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], 1));
        high = fmaxf(row_max[r], fmaxf(high, __shfl_xor_sync(~0u, high, 2)));
        // A row that has seen nothing has nothing to rescale.
        rescale[r] = high == -INFINITY ? 1.f : fast_exp2((row_max[r] - high) * to_log2);
        row_max[r] = high;
        row_sum[r] *= rescale[r];
        base[r] = high == -INFINITY ? 0.f : high * to_log2;
      }
      large = __any_sync(~0u, fmaxf(fabsf(base[0]), fabsf(base[1])) > kLargestInLog2);
    }
    exponentials(s);
  }

 private:
  FLASH_ATTN_DEVICE void exponentials(float (&s)[kSize]) {
    float less[2] = {base[0], base[1]};
    if (__builtin_expect(large, 0)) {  // the difference is taken first
#pragma unroll
      for (int r = 0; r < 2; ++r) less[r] = row_max[r] == -INFINITY ? 0.f : row_max[r];
#pragma unroll
      for (int i = 0; i < kSize; ++i) s[i] -= less[i / 2 % 2];
      less[0] = less[1] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) s[i] = fast_exp2(fmaf(s[i], to_log2, -less[i / 2 % 2]));
    float partial[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int i = 4; i < kSize; ++i) partial[i % 4] += s[i];
    row_sum[0] += partial[0] + partial[1];
    row_sum[1] += partial[2] + partial[3];
  }
};

}  // namespace flash_attn::cuda::sm90::forward
