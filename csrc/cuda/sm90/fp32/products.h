// Products of tiles of pairs by warpgroups: as sm80/fp32/products.h, on the same fragments, with operands of tiles in
// panels (hopper/wgmma.h). Terms of low halves come first in a sum, so that the alignment to large ones cuts nothing
// off. What a start_ function begins is a group of its own; its finish_ function comes behind the wait for it.
#pragma once

#include "../../sm80/fp32/pair.h"
#include "../hopper/tma.h"
#include "../hopper/wgmma.h"

namespace flash_attn::cuda::sm90::fp32 {

using sm80::fp32::PairFragment;

#define SM90_REGISTERS_16 SM90_REGISTERS() ", %10, %11, %12, %13, %14, %15"
#define SM90_ACCUMULATORS_16 \
  SM90_ACCUMULATORS(), "+f"(acc[10]), "+f"(acc[11]), "+f"(acc[12]), "+f"(acc[13]), "+f"(acc[14]), "+f"(acc[15])

struct Instructions : Wgmma<__half> {
  using Wgmma<__half>::ss;
  using Wgmma<__half>::rs;
  SM90_WGMMA("f16", 32, 16, 16, 17, 18, 19, 20, 21, 22, 23)
};

/// A tile in panels of 64 columns, each of kRows rows.
template <int kRows, int kColumns>
struct PanelTile {
  static constexpr int kChunks = kColumns / 8, kRowBytes = 128;  // within a panel
  static constexpr int kPanelBytes = kRows * kRowBytes;

  /// Bytes from the tile's start.
  SM80_DEVICE static uint32_t offset(int row, int chunk) {
    return uint32_t(chunk >> 3) * kPanelBytes + uint32_t(row) * kRowBytes + (uint32_t(chunk ^ row) % 8 << 4);
  }
};
template <int kRows, int kColumns>
SM80_DEVICE constexpr int bytes_of_chunks(PanelTile<kRows, kColumns>, int chunks) {
  return chunks / 8 * PanelTile<kRows, kColumns>::kPanelBytes;
}

/// What all lanes of a warp have, so that the compiler keeps it, and what is added to it, in uniform registers.
SM80_DEVICE uint32_t uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

template <int kN>
using FlatScores = float[4 * kN];
/// s as wgmma's accumulators.
template <int kN>
SM80_DEVICE FlatScores<kN>& flat(float (&s)[1][kN][4]) {
  return reinterpret_cast<FlatScores<kN>&>(s);
}

/// sum (64, 8 kN) = a b^T over half `half` of the columns of both tiles; of the tiles a panel has kRowsA and kRowsB
/// rows. `a`, `b`: where they lie, by uniform() of a sixteenth, a from the warpgroup's first row on.
template <bool kReduced, int kHeadDim, int kRowsA, int kRowsB, int kN>
SM80_DEVICE void issue_half(FlatScores<kN>& sum, uint32_t a, uint32_t b, int half) {
  constexpr int kSteps = kHeadDim / 16;
  const int first = half * (kSteps / 2);
#pragma unroll
  for (int d = first; !kReduced && d < first + kSteps / 2; ++d) {
    const uint32_t a_low = a + k_step_along(d + kSteps, kRowsA), b_high = b + k_step_along(d, kRowsB);
    if (d == first) {
      Instructions::ss<false>(sum, a_low, b_high);
    } else {
      Instructions::ss<true>(sum, a_low, b_high);
    }
    Instructions::ss<true>(sum, a + k_step_along(d, kRowsA), b + k_step_along(d + kSteps, kRowsB));
  }
#pragma unroll
  for (int d = first; d < first + kSteps / 2; ++d) {
    const uint32_t a_high = a + k_step_along(d, kRowsA), b_high = b + k_step_along(d, kRowsB);
    if (kReduced && d == first) {
      Instructions::ss<false>(sum, a_high, b_high);
    } else {
      Instructions::ss<true>(sum, a_high, b_high);
    }
  }
}

/// s + later (64, 8 kN) = a b^T over the columns of both tiles, a half of them each; see issue_half().
template <bool kReduced, int kHeadDim, int kRowsA, int kRowsB, int kN>
SM80_DEVICE void start_rows(FlatScores<kN>& s, FlatScores<kN>& later, uint32_t a, uint32_t b) {
  a = uniform(a >> 4), b = uniform(b >> 4);
  issue_half<kReduced, kHeadDim, kRowsA, kRowsB, kN>(s, a, b, 0);
  issue_half<kReduced, kHeadDim, kRowsA, kRowsB, kN>(later, a, b, 1);
  wgmma_commit();
}
template <int kN>
SM80_DEVICE void finish_rows(float (&s)[1][kN][4], FlatScores<kN>& later) {
  wgmma_results(flat(s));
  wgmma_results(later);
#pragma unroll
  for (int i = 0; i < 4 * kN; ++i) flat(s)[i] += later[i];
}

/// sum (64, 2 kSize) = a b, of which a (64, 16 kK) is in registers and b is columns from `first` on of a tile of
/// kColumns columns and 16 kK rows.
template <bool kReduced, int kColumns, int kSize, int kK>
SM80_DEVICE void start_columns(float (&sum)[kSize], const PairFragment (&a)[kK][1], uint32_t b, int first) {
  constexpr int kPanels = kColumns / 64, kPanel = 16 * kK * 8;
  const uint32_t high = uniform(b >> 4 | uint32_t(kPanel) << 16) + first / 64 * kPanel + first % 64 / 8;
  const uint32_t low = high + kPanels * kPanel;
#pragma unroll
  for (int k = 0; !kReduced && k < kK; ++k) {
    if (k == 0) {
      Instructions::rs<false>(sum, a[k][0].low, high + k_step_across(k));
    } else {
      Instructions::rs<true>(sum, a[k][0].low, high + k_step_across(k));
    }
    Instructions::rs<true>(sum, a[k][0].high, low + k_step_across(k));
  }
#pragma unroll
  for (int k = 0; k < kK; ++k) {
    if (kReduced && k == 0) {
      Instructions::rs<false>(sum, a[k][0].high, high + k_step_across(k));
    } else {
      Instructions::rs<true>(sum, a[k][0].high, high + k_step_across(k));
    }
  }
  wgmma_commit();
}
/// o += sum times `unit(0, half)` of the lane's rows, in columns from `first` on.
template <int kDTiles, int kSize, typename Unit>
SM80_DEVICE void finish_columns(float (&o)[1][kDTiles][4], float (&sum)[kSize], int first, const Unit& unit) {
  wgmma_results(sum);
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    float& x = o[0][first / 8 + j / 4][j % 4];
    x = fmaf(sum[j], unit(0, j / 2 % 2), x);
  }
}

/// sum (64, 2 kSize) = a b over 16 kSteps terms, which are rows of a. `a` and `b` have their low halves `a_low` and
/// `b_low` further on.
template <bool kReduced, Major kMajorB, int kSteps, int kSize, typename StepOfB>
SM80_DEVICE void issue_across(float (&sum)[kSize], uint32_t a, uint32_t b, uint32_t a_low, uint32_t b_low,
                              const StepOfB& step_of_b) {
#pragma unroll
  for (int k = 0; !kReduced && k < kSteps; ++k) {
    const uint32_t a_high = a + k_step_across(k), b_high = b + step_of_b(k);
    if (k == 0) {
      Instructions::ss<false, kRows, kMajorB>(sum, a_high + a_low, b_high);
    } else {
      Instructions::ss<true, kRows, kMajorB>(sum, a_high + a_low, b_high);
    }
    Instructions::ss<true, kRows, kMajorB>(sum, a_high, b_high + b_low);
  }
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    if (kReduced && k == 0) {
      Instructions::ss<false, kRows, kMajorB>(sum, a + k_step_across(k), b + step_of_b(k));
    } else {
      Instructions::ss<true, kRows, kMajorB>(sum, a + k_step_across(k), b + step_of_b(k));
    }
  }
}

/// Of 64 keys: sum (64 columns of K, 8 kN queries) = K^T dS. `keys`: K's panel of these columns from the first of the
/// keys on, of kRowsK rows, with its low halves kPanelsK panels further on; `ds`: panels of high and of low halves,
/// whose rows are queries.
template <bool kReduced, int kRowsK, int kPanelsK, int kN>
SM80_DEVICE void issue_dq(FlatScores<kN>& sum, uint32_t keys, uint32_t ds) {
  constexpr uint32_t kPanel = kRowsK * 8;
  issue_across<kReduced, kColumns, 4>(sum, uniform(keys >> 4 | kPanel << 16), uniform(ds >> 4), kPanelsK * kPanel,
                                      8 * kN * 8, [](int k) { return k_step_along(k, 8 * kN); });
}

/// sum (64 keys, 64 columns of Q) = dS^T Q. `queries`: Q's panel of these columns, of 8 kN rows, with its low halves
/// kPanelsQ panels further on; `ds` as above.
template <bool kReduced, int kPanelsQ, int kN>
SM80_DEVICE void issue_dk(float (&sum)[32], uint32_t ds, uint32_t queries) {
  constexpr uint32_t kPanel = 8 * kN * 8;
  issue_across<kReduced, kRows, kN / 2>(sum, uniform(ds >> 4 | kPanel << 16), uniform(queries >> 4 | kPanel << 16),
                                        kPanel, kPanelsQ * kPanel, [](int k) { return k_step_across(k); });
}

/// See sm80::fp32::MmaProducts.
template <bool kReduced_>
struct WarpgroupProducts {
  static constexpr bool kReduced = kReduced_;
  template <int kRows, int kColumns>
  using Tile = PanelTile<kRows, kColumns>;
  static constexpr int kAlignment = 1024;

  SM80_DEVICE static void release_copies() { async_proxy_fence(); }

  template <int kHeadDim, int kSumSteps, int kRowsA, int kRowsB, int kN, typename Thread>
  SM80_DEVICE static void multiply_rows(float (&s)[1][kN][4], uint32_t a, uint32_t b, const Thread& thread) {
    static_assert(kHeadDim / 16 == 2 * kSumSteps);
    FlatScores<kN> later;
    wgmma_fence();
    start_rows<kReduced, kHeadDim, kRowsA, kRowsB, kN>(flat(s), later, a + thread.warp() / 4 * 64 * 128, b);
    wgmma_wait<0>();
    finish_rows(s, later);
  }

  /// kAhead panels are computed at a time.
  template <int kHeadDim, int kAhead, int kK, typename Unit, typename Thread>
  SM80_DEVICE static void add_product(float (&o)[1][kHeadDim / 8][4], const PairFragment (&a)[kK][1], uint32_t b,
                                      const Unit& unit, const Thread&) {
    constexpr int kPanels = kHeadDim / 64;
    static_assert(kPanels % kAhead == 0 && kAhead <= 2);
#pragma unroll
    for (int first = 0; first < kPanels; first += kAhead) {
      float sum[kAhead][32];
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kAhead; ++i) start_columns<kReduced, kHeadDim>(sum[i], a, b, 64 * (first + i));
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (i + 1 < kAhead) {
          wgmma_wait<1>();
        } else {
          wgmma_wait<0>();
        }
        finish_columns(o, sum[i], 64 * (first + i), unit);
      }
    }
  }
};

}  // namespace flash_attn::cuda::sm90::fp32
