// Products of tiles of pairs on a warp's fragments (layouts: ../mma.h). The tensor core rounds toward zero, so that a
// long sum inside of it shrinks: sums begin anew, and what they come to is added up as ordinary floats.
#pragma once

#include "../products.h"
#include "pair.h"
#include "tiles.h"

namespace flash_attn::cuda::sm80::fp32 {

/// High and low halves of 16 columns of a tile, of number `step`.
template <int kHeadDim, bool kReduced>
SM80_DEVICE void load_pair(PairFragment& pair, uint32_t lane_address, int step, int row) {
  using Tile = SharedTile<2 * kHeadDim>;
  ldmatrix_x4(pair.high, Tile::along(lane_address, step) + row * Tile::kRowBytes);
  if constexpr (!kReduced)
    ldmatrix_x4(pair.low, Tile::along(lane_address, step + kHeadDim / 16) + row * Tile::kRowBytes);
}
template <int kHeadDim, bool kReduced>
SM80_DEVICE void load_pair_trans(PairFragment& pair, uint32_t lane_address, int step, int row) {
  using Tile = SharedTile<2 * kHeadDim>;
  ldmatrix_x4_trans(pair.high, Tile::along(lane_address, step) + row * Tile::kRowBytes);
  if constexpr (!kReduced)
    ldmatrix_x4_trans(pair.low, Tile::along(lane_address, step + kHeadDim / 16) + row * Tile::kRowBytes);
}

/// s (16 kM, 8 kN) = a b^T over the columns of both tiles; a by rows, b by columns. A sum is of 16 kSumSteps columns.
template <bool kReduced, int kHeadDim, int kSumSteps, int kM, int kN>
SM80_DEVICE void multiply_rows(float (&s)[kM][kN][4], uint32_t a_lane, uint32_t b_lane) {
  constexpr int kSteps = kHeadDim / 16;
  static_assert(kSteps % kSumSteps == 0);
  float rest[kM][kN][4];
  clear(s);
  clear(rest);
#pragma unroll
  for (int first = 0; first < kSteps; first += kSumSteps) {
    float later[kM][kN][4];
    clear(later);
    float (&sum)[kM][kN][4] = first == 0 ? s : later;
#pragma unroll
    for (int d = first; d < first + kSumSteps; ++d) {
      PairFragment a[kM];
#pragma unroll
      for (int m = 0; m < kM; ++m) load_pair<kHeadDim, kReduced>(a[m], a_lane, d, 16 * m);
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        PairFragment b;
        load_pair<kHeadDim, kReduced>(b, b_lane, d, 8 * n);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma_pair<kReduced>(sum[m][n], rest[m][n], a[m], b, 0);
          mma_pair<kReduced>(sum[m][n + 1], rest[m][n + 1], a[m], b, 1);
        }
      }
    }
    if (first > 0) add(s, later);
  }
  add(s, rest);
}

/// o (16 kM, kHeadDim) += a b, of which a (16 kM, 16 kK) is in registers and b lies by rows. `unit(m, half)` is what a
/// number of o is of those of a b, for each of the lane's rows.
template <bool kReduced, int kHeadDim, int kM, int kK, typename Unit>
SM80_DEVICE void add_product(float (&o)[kM][kHeadDim / 8][4], const PairFragment (&a)[kK][kM], uint32_t b_lane,
                             const Unit& unit) {
#pragma unroll
  for (int d = 0; d < kHeadDim / 8; d += 2) {
    float sum[kM][2][4], rest[kM][2][4];
    clear(sum);
    clear(rest);
#pragma unroll
    for (int k = 0; k < kK; ++k) {
      PairFragment b;
      load_pair_trans<kHeadDim, kReduced>(b, b_lane, d / 2, 16 * k);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_pair<kReduced>(sum[m][0], rest[m][0], a[k][m], b, 0);
        mma_pair<kReduced>(sum[m][1], rest[m][1], a[k][m], b, 1);
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          o[m][d + j][i] = fmaf(sum[m][j][i] + rest[m][j][i], unit(m, i / 2), o[m][d + j][i]);
        }
  }
}

/// What a kernel's products are made of: mma.sync, and sm90::fp32::WarpgroupProducts. `thread` knows warp() and lane().
/// kReduced_: of numbers rounded to fp16, one product instead of three.
template <bool kReduced_>
struct MmaProducts {
  static constexpr bool kReduced = kReduced_;
  template <int kRows, int kColumns>
  using Tile = SharedTile<kColumns>;
  static constexpr int kAlignment = 128;  // of tiles

  /// Before the barrier behind which products read what this thread has copied to shared memory.
  SM80_DEVICE static void release_copies() {}

  /// s = a b^T of tiles in shared memory, of which `a` has kRowsA rows, 16 kM of them this warp's.
  template <int kHeadDim, int kSumSteps, int kRowsA, int kRowsB, int kM, int kN, typename Thread>
  SM80_DEVICE static void multiply_rows(float (&s)[kM][kN][4], uint32_t a, uint32_t b, const Thread& thread) {
    using PairTile = SharedTile<2 * kHeadDim>;
    const int lane = thread.lane();
    fp32::multiply_rows<kReduced, kHeadDim, kSumSteps>(s, address_by_rows<PairTile>(a, thread.warp() * (16 * kM), lane),
                                                       address_by_columns<PairTile>(b, 0, lane));
  }

  /// o += a b, see above.
  template <int kHeadDim, int kAhead, int kM, int kK, typename Unit, typename Thread>
  SM80_DEVICE static void add_product(float (&o)[kM][kHeadDim / 8][4], const PairFragment (&a)[kK][kM], uint32_t b,
                                      const Unit& unit, const Thread& thread) {
    fp32::add_product<kReduced, kHeadDim>(o, a, address_by_rows<SharedTile<2 * kHeadDim>>(b, 0, thread.lane()), unit);
  }
};

/// A fragments of accumulators times `factor(m, half)` of the lane's rows.
template <int kM, int kN, typename Factor>
SM80_DEVICE void split_fragments(const float (&s)[kM][kN][4], PairFragment (&pairs)[kN / 2][kM], const Factor& factor) {
#pragma unroll
  for (int k = 0; k < kN / 2; ++k)
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const x = s[m][2 * k + i / 2] + i % 2 * 2;
        const float f = factor(m, i % 2);
        split_pair(x[0] * f, x[1] * f, pairs[k][m].high[i], pairs[k][m].low[i]);
      }
}

}  // namespace flash_attn::cuda::sm80::fp32
