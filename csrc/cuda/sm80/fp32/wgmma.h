// Products of tiles of pairs by warpgroups, on Hopper: as products.h, on the same fragments, with operands of tiles in
// panels (PanelTile). Terms of low halves come first, so that the alignment to large ones cuts nothing off.
#pragma once

#include "../../sm90/hopper/wgmma.h"
#include "pair.h"

namespace flash_attn::cuda::sm80::fp32 {

#define SM90_REGISTERS_16 SM90_REGISTERS() ", %10, %11, %12, %13, %14, %15"
#define SM90_ACCUMULATORS_16 \
  SM90_ACCUMULATORS(), "+f"(acc[10]), "+f"(acc[11]), "+f"(acc[12]), "+f"(acc[13]), "+f"(acc[14]), "+f"(acc[15])

namespace wgmma {
using namespace sm90;

struct Products : Wgmma<__half> {
  using Wgmma<__half>::ss;
  using Wgmma<__half>::rs;
  SM90_WGMMA("f16", 32, 16, 16, 17, 18, 19, 20, 21, 22, 23)
};

/// s (64, 8 kN) = a b^T over the columns of both tiles, of which a panel has kRowsA and kRowsB rows. `a`, `b`: where
/// they lie, a from the warpgroup's first row on. A sum is of 16 kSumSteps columns.
template <int kHeadDim, int kSumSteps, int kRowsA, int kRowsB, int kN>
SM80_DEVICE void multiply_rows(float (&s)[1][kN][4], uint32_t a, uint32_t b) {
  constexpr int kSteps = kHeadDim / 16;
  static_assert(kSteps == 2 * kSumSteps);
  using Flat = float[4 * kN];
  float later[4 * kN];
  Flat& first = reinterpret_cast<Flat&>(s);
  a >>= 4, b >>= 4;
  wgmma_fence();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Flat& sum = half == 0 ? first : later;
#pragma unroll
    for (int i = 0; i < kSumSteps; ++i) {
      const int d = half * kSumSteps + i;
      const uint32_t a_low = a + k_step_along(d + kSteps, kRowsA), b_high = b + k_step_along(d, kRowsB);
      if (i == 0) {
        Products::ss<false>(sum, a_low, b_high);
      } else {
        Products::ss<true>(sum, a_low, b_high);
      }
      Products::ss<true>(sum, a + k_step_along(d, kRowsA), b + k_step_along(d + kSteps, kRowsB));
    }
#pragma unroll
    for (int i = 0; i < kSumSteps; ++i) {
      const int d = half * kSumSteps + i;
      Products::ss<true>(sum, a + k_step_along(d, kRowsA), b + k_step_along(d, kRowsB));
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_results(first);
  wgmma_results(later);
#pragma unroll
  for (int i = 0; i < 4 * kN; ++i) first[i] += later[i];
}

/// o (64, kHeadDim) += a b, of which a (64, 16 kK) is in registers and b, kRowsB rows, lies at `b`. kAhead panels of 64
/// columns are computed at a time.
template <int kHeadDim, int kRowsB, int kAhead, int kK, typename Unit>
SM80_DEVICE void add_product(float (&o)[1][kHeadDim / 8][4], const PairFragment (&a)[kK][1], uint32_t b,
                             const Unit& unit) {
  constexpr int kPanels = kHeadDim / 64, kPanel = kRowsB * 8;
  static_assert(kRowsB == 16 * kK && kPanels % kAhead == 0);
  b = b >> 4 | uint32_t(kPanel) << 16;
#pragma unroll
  for (int first = 0; first < kPanels; first += kAhead) {
    float sum[kAhead][32];
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t high = b + (first + i) * kPanel, low = high + kPanels * kPanel;
#pragma unroll
      for (int k = 0; k < kK; ++k) {
        if (k == 0) {
          Products::rs<false>(sum[i], a[k][0].low, high + k_step_across(k));
        } else {
          Products::rs<true>(sum[i], a[k][0].low, high + k_step_across(k));
        }
        Products::rs<true>(sum[i], a[k][0].high, low + k_step_across(k));
      }
#pragma unroll
      for (int k = 0; k < kK; ++k) Products::rs<true>(sum[i], a[k][0].high, high + k_step_across(k));
      wgmma_commit();
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i + 1 < kAhead) {
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      wgmma_results(sum[i]);
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        float& x = o[0][8 * (first + i) + j / 4][j % 4];
        x = fmaf(sum[i][j], unit(0, j / 2 % 2), x);
      }
    }
  }
}

}  // namespace wgmma
}  // namespace flash_attn::cuda::sm80::fp32
