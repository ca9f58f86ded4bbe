// Products as in products.h with one group of sums instead of two: terms of low halves come first, because added to a
// large sum the alignment would cut them off. That takes fewer registers and additions, but reads more fragments ahead.
#pragma once

#include "products.h"

namespace flash_attn::cuda::sm80::fp32 {

/// sum (16 kM, 16) = a b over 16 kSteps terms.
template <bool kReduced, int kSteps, int kM>
SM80_DEVICE void multiply_in_one_sum(float (&sum)[kM][2][4], const PairFragment (&a)[kSteps][kM],
                                     const PairFragment (&b)[kSteps]) {
  clear(sum);
  const auto add = [&](int m, int j, const uint32_t (&x)[4], const uint32_t (&y)[4]) {
    mma_m16n8k16<__half>(sum[m][j], x, y[2 * j], y[2 * j + 1]);
  };
#pragma unroll
  for (int k = 0; !kReduced && k < kSteps; ++k)
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j) add(m, j, a[k][m].low, b[k].high), add(m, j, a[k][m].high, b[k].low);
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j) add(m, j, a[k][m].high, b[k].high);
}

/// As multiply_rows().
template <bool kReduced, int kHeadDim, int kSumSteps, int kM, int kN>
SM80_DEVICE void multiply_rows_in_one_sum(float (&s)[kM][kN][4], uint32_t a_lane, uint32_t b_lane) {
  constexpr int kSteps = kHeadDim / 16;
  static_assert(kSteps % kSumSteps == 0);
#pragma unroll
  for (int first = 0; first < kSteps; first += kSumSteps) {
    PairFragment a[kSumSteps][kM];
#pragma unroll
    for (int d = 0; d < kSumSteps; ++d)
#pragma unroll
      for (int m = 0; m < kM; ++m) load_pair<kHeadDim, kReduced>(a[d][m], a_lane, first + d, 16 * m);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      PairFragment b[kSumSteps];
#pragma unroll
      for (int d = 0; d < kSumSteps; ++d) load_pair<kHeadDim, kReduced>(b[d], b_lane, first + d, 8 * n);
      float sum[kM][2][4];
      multiply_in_one_sum<kReduced>(sum, a, b);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][n + j][i] = first == 0 ? sum[m][j][i] : s[m][n + j][i] + sum[m][j][i];
    }
  }
}

/// As add_product().
template <bool kReduced, int kHeadDim, int kM, int kK, typename Unit>
SM80_DEVICE void add_product_in_one_sum(float (&o)[kM][kHeadDim / 8][4], const PairFragment (&a)[kK][kM],
                                        uint32_t b_lane, const Unit& unit) {
#pragma unroll
  for (int d = 0; d < kHeadDim / 8; d += 2) {
    PairFragment b[kK];
#pragma unroll
    for (int k = 0; k < kK; ++k) load_pair_trans<kHeadDim, kReduced>(b[k], b_lane, d / 2, 16 * k);
    float sum[kM][2][4];
    multiply_in_one_sum<kReduced>(sum, a, b);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][d + j][i] = fmaf(sum[m][j][i], unit(m, i / 2), o[m][d + j][i]);
  }
}

}  // namespace flash_attn::cuda::sm80::fp32
