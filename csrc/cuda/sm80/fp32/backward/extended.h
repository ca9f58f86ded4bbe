// BackwardScores: P and dS where a score is more than scale * q.k, or dropout takes some away.
#pragma once

#include "../../../mask/transposed_bits.h"
#include "../../backward/extended.h"
#include "../rules.h"
#include "scores.h"

namespace flash_attn::cuda::sm80::fp32 {

/// Which of a lane's scores exist, a bit for each.
template <typename Config>
struct ShownScores {
  static_assert(Config::kMTiles == 1 && Config::kNTiles <= 8);
  uint32_t bits = ~0u;

  /// As attn_mask's bits lie; transposed ones come in cells of 16 queries.
  SM80_DEVICE static constexpr int bit(int n, int i) {
    return Config::kOfKeys ? 8 * (n / 2) + 4 * (i / 2) + 2 * (n % 2) + i % 2 : 4 * n + i;
  }
  SM80_DEVICE bool hold(int n, int i) const { return (bits >> bit(n, i) & 1) != 0; }
  SM80_DEVICE void hide(int n, int i) { bits &= ~(1u << bit(n, i)); }

  /// What attn_mask shows, if its bits say all, of the warp's fragments from `row` and `column` on.
  SM80_DEVICE void load(const mask::PackedMask& packed, int batch, int head, int row, int column, int lane) {
    if constexpr (Config::kOfKeys) {
      const int col_cell = min(row / mask::kCellCols, packed.col_cells - 1);
      bits = 0;
#pragma unroll
      for (int q = 0; q < Config::kNTiles / 2; ++q) {
        const int row_cell = min(column / mask::kCellRows + q, packed.row_cells - 1);
        const uint32_t x = mask::transposed_bits(packed, packed.cell(batch, head, row_cell, col_cell), lane);
        bits |= (x >> (row % mask::kCellCols / 2) & 0xff) << (8 * q);
      }
    } else {
      MaskFragments<1, Config::kNTiles> fragments;
      fragments.load(packed, batch, head, row, column);
      bits = fragments.bits[0];
    }
  }
};

template <typename Config>
SM80_DEVICE void BackwardScores<Config>::find_shown(ShownScores<Config>& shown, bool biased, int at) const {
  const int row = tile.own_begin + warp() * Config::kWarpRows, first = block * kBlockN;
  if (params.packed.seen != nullptr && !biased) {
    shown.load(params.packed, tile.batch, head, row, first, at);
  }
  if (!is_partial()) return;
  const int column = first + at % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int own = row + 8 * r + at / 4;
    const int low = own + tile.low - column;
    const int high = own - tile.own_begin < tile.own_rows ? min(own + tile.high, tile.others - 1) - column : -1;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (8 * n + c < low || 8 * n + c > high) shown.hide(n, 2 * r + c);
      }
    }
  }
}

template <typename Config>
template <bool kBias>
SM80_DEVICE void BackwardScores<Config>::find_extended(Scores& s, Scores& dp, float dp_unit, uint32_t statistics,
                                                       int at) {
  const HeadRules<kOfKeys, kMTiles, kNTiles> rules(p, tile.sequence, tile.batch, head);
  const FragmentOrigin origin{tile.own_begin + own_row(0, 0), block * kBlockN + at % 4 * 2};
  const int64_t batch_head = tile.batch * p.num_heads + head;
  KeptScores<true, 1, kNTiles / 2> kept;
  kept.set_all();
  if (p.dropout_p > 0.0) {
    const Dropout dropout = make_dropout(p.rng_state, p.dropout_p);
    dp_unit *= float(dropout.scale);
    if constexpr (kOfKeys) {
      kept.draw(dropout, batch_head, block * kBlockN, tile.own_begin + warp() * Config::kWarpRows, at);
    } else {
      apply_dropout(dp, dropout, batch_head, FragmentPlace{origin.row, origin.column});
    }
  }
  ShownScores<Config> shown;
  find_shown(shown, kBias, at);
  const float inverse_softcap = rules.softcap > 0.f ? 1.f / rules.softcap : 0.f;
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
    float2 lse_of_column{0.f, 0.f}, delta_of_column{0.f, 0.f};
    if constexpr (kOfKeys) {
      lse_of_column = statistic(statistics, n, at);
      delta_of_column = statistic(statistics + 4 * kBlockN, n, at);
    }
    float2 bias[2];
    if constexpr (kBias) bias[0] = rules.bias_of(origin, 0, n, 0), bias[1] = rules.bias_of(origin, 0, n, 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float row_lse = kOfKeys ? (i % 2 == 0 ? lse_of_column.x : lse_of_column.y) : lse[0][i / 2];
      const float row_delta = kOfKeys ? (i % 2 == 0 ? delta_of_column.x : delta_of_column.y) : delta[0][i / 2];
      const float distance = rules.distance(origin, 0, n, i);
      float score = rules.add_slope(s[0][n][i], distance);
      if constexpr (kBias) score = rules.add_bias(score, i % 2 == 0 ? bias[i / 2].x : bias[i / 2].y);
      const float above = score - row_lse;
      // Above 0 by rounding alone; P is at most 1, for fp16's sake.
      const float exponential = fast_exp2((above > 0.f ? 0.f : above) * kLog2E);
      const float probability = shown.hold(n, i) && score != -INFINITY ? exponential : 0.f;
      const bool is_kept = !kOfKeys || kept.hold(0, n, i);
      const float gradient = fmaf(is_kept ? dp[0][n][i] : 0.f, dp_unit, -row_delta);
      const float ds = probability * gradient;
      if constexpr (!kOfKeys) slope_sum[i / 2] = fmaf(ds, distance, slope_sum[i / 2]);
      const float tanh = s[0][n][i] * inverse_softcap;
      dp[0][n][i] = ds * fmaf(-tanh, tanh, 1.f);
      s[0][n][i] = is_kept ? probability : 0.f;
    }
  }
}

template <typename Config>
SM80_DEVICE void BackwardScores<Config>::take_extended(Scores& s, Scores& dp, float s_unit, float dp_unit,
                                                       uint32_t statistics, int at) {
  HeadRules<kOfKeys, kMTiles, kNTiles>(p, tile.sequence, tile.batch, head).scale_scores(s, s_unit);
  const int own = tile.own_begin + warp() * Config::kWarpRows, other = block * kBlockN;
  bool biased = false;
  if (p.mask.data != nullptr) {
    if constexpr (kOfKeys) {
      biased = adds_values<kBlockN, Config::kWarpRows>(p.mask, params.packed, tile.batch, head, other, own);
    } else {
      biased = adds_values<Config::kWarpRows, kBlockN>(p.mask, params.packed, tile.batch, head, own, other);
    }
  }
  if (__any_sync(~0u, biased)) {
    find_extended<true>(s, dp, dp_unit, statistics, at);
  } else {
    find_extended<false>(s, dp, dp_unit, statistics, at);
  }
  if (params.dmask != nullptr) add_mask_gradient(dp, at);
}

template <typename Config>
SM80_DEVICE void BackwardScores<Config>::add_mask_gradient(const Scores& ds, int at) const {
  const MaskView& mask = p.mask;
  const int64_t slice = (mask.batch_size == 1 ? 0 : tile.batch) * mask.head_size + (mask.head_size == 1 ? 0 : head);
  const int row = own_row(0, 0), column = block * kBlockN + at % 4 * 2;
  const int64_t row_stride = kOfKeys ? 1 : mask.col_size, column_stride = kOfKeys ? mask.col_size : 1;
  float* const to = params.dmask + slice * mask.row_size * mask.col_size + (tile.own_begin + row) * row_stride +
                    column * column_stride;
#pragma unroll
  for (int n = 0; n < kNTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = ds[0][n][i];
      if (x != 0.f && row + i / 2 * 8 < tile.own_rows && column + 8 * n + i % 2 < tile.others) {
        atomicAdd(to + i / 2 * 8 * row_stride + (8 * n + i % 2) * column_stride, x);
      }
    }
}

template <typename Config>
SM80_DEVICE void BackwardScores<Config>::store_slope_sums() const {
  if (params.rows.slope_sum == nullptr) return;
  const int64_t first = statistics_place(tile.head_begin) + tile.own_begin;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(slope_sum[r]);
    const int row = own_row(0, r);
    if (lane() % 4 == 0 && row < tile.own_rows) static_cast<float*>(params.rows.slope_sum)[first + row] = sum;
  }
}

}  // namespace flash_attn::cuda::sm80::fp32
