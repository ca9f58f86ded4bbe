// Backward in float32: a tile's P and dS, from products in registers to shared memory.
#pragma once

#include "backward_block.h"

namespace flash_attn::cuda::universal::float32 {
namespace {

/// Of the thread's scores those of query `i` of four and keys [4 g, 4 g + 4).
template <typename C>
FLASH_ATTN_DEVICE float4& four_keys(float* scores, int i, int g) {
  return *reinterpret_cast<float4*>(scores + place_of(grid_column(), i) * C::kLd + place_of(grid_row(), 4 * g));
}

/// From q k^T to P in shared memory; -0 where there is no score.
template <typename C>
FLASH_ATTN_DEVICE void store_probabilities(float* to, float (&s)[kRows][C::kCols], const ScoreTile& t, float scale,
                                           const typename C::Statistics& statistics) {
  float lse[4], lost[4];
  load_four(statistics.lse + place_of(grid_column(), 0), lse);
  load_four(statistics.lost + place_of(grid_column(), 0), lost);
#pragma unroll
  for (int i = 0; i < C::kCols; ++i) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) s[j][i] = fmaf(s[j][i], scale, -lse[i]) - lost[i];
  }
  if (t.partial) {
#pragma unroll
    for (int i = 0; i < C::kCols; ++i) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        if (!t.sees(place_of(grid_column(), i), place_of(grid_row(), j))) s[j][i] = -INFINITY;
      }
    }
  }
  // Above 0 by rounding alone, which of very large scores is enough for an infinity.
  const auto probability = [](float x) { return x == -INFINITY ? -0.f : natural_exp(-fabsf(x)); };
#pragma unroll
  for (int i = 0; i < C::kCols; ++i) {
#pragma unroll
    for (int j = 0; j < kRows; j += 4) {
      four_keys<C>(to, i, j / 4) =
          float4{probability(s[j][i]), probability(s[j + 1][i]), probability(s[j + 2][i]), probability(s[j + 3][i])};
    }
  }
}

/// P becomes dS = P (dP - delta).
template <typename C>
FLASH_ATTN_DEVICE void store_gradients(float* scores, const float (&dp)[kRows][C::kCols],
                                       const typename C::Statistics& statistics) {
  float delta[4];
  load_four(statistics.delta + place_of(grid_column(), 0), delta);
  const auto gradient = [](float p, float of_p) { return __float_as_uint(p) == 0x80000000u ? 0.f : p * of_p; };
#pragma unroll
  for (int i = 0; i < C::kCols; ++i) {
#pragma unroll
    for (int j = 0; j < kRows; j += 4) {
      float4& x = four_keys<C>(scores, i, j / 4);
      const float4 p = x;
      x = float4{gradient(p.x, dp[j][i] - delta[i]), gradient(p.y, dp[j + 1][i] - delta[i]),
                 gradient(p.z, dp[j + 2][i] - delta[i]), gradient(p.w, dp[j + 3][i] - delta[i])};
    }
  }
}

/// Rows of s are keys, columns queries.
template <typename C, typename Storage>
FLASH_ATTN_DEVICE void add_mask_transposed(float (&s)[kRows][C::kCols], const MaskTile& mask, const ScoreTile& t) {
#pragma unroll
  for (int i = 0; i < C::kCols; ++i) {
    const FreshPlace at;
    const int row = min(place_of(at.column, i), t.queries - 1) * mask.row;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      s[j][i] = MaskTile::add(s[j][i], mask.load<Storage>(row + min(place_of(at.row, j), t.keys - 1) * mask.column));
    }
    __syncwarp();  // keeps the compiler from reading the mask of all rows at once
  }
}

/// Of an extended tile, what is kept from P for dS: P times the softcap's derivative; -0 where there is no score.
using Factors = float[kRows][4];

/// value(i, j, kept) of the thread's queries i and keys j to shared memory, `kept` by dropout or not.
template <typename C, typename Bits, typename Value>
FLASH_ATTN_DEVICE void store_kept(float* to, const FreshPlace& at, const ScoreRules& rules, const Bits& kept,
                                  const Value& value) {
  const int query = place_of(at.column, 0);
#pragma unroll
  for (int i = 0; i < C::kCols; ++i) {
#pragma unroll
    for (int j = 0; j < kRows; j += 4) {
      const int key = place_of(at.row, j);
      const uint32_t bits = C::kRules == kAllRules && rules.dropout ? kept.four(query + i, key) : 15;
      float x[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) x[u] = value(i, j + u, (bits >> u & 1) != 0);
      *reinterpret_cast<float4*>(to + (query + i) * C::kLd + key) = float4{x[0], x[1], x[2], x[3]};
    }
  }
}

/// From q k^T to P after dropout in shared memory and `factors`; of kMasks as store_probabilities(). Marks queries and
/// keys that have a score.
template <typename C, typename Bits>
FLASH_ATTN_DEVICE void store_extended(float* to, float (&s)[kRows][C::kCols], Factors& factors, ScoreRules rules,
                                      const MaskTile& mask, const ScoreTile& t,
                                      const typename C::Statistics& statistics, const Bits& kept,
                                      Alive<kKeys>& alive_keys, Alive<kQueries>& alive_queries) {
  if constexpr (C::kRules == kMasks) rules.softcap = 0.f;  // which the compiler did not know
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
#pragma unroll
    for (int i = 0; i < C::kCols; ++i) factors[j][i] = 1.f;
  }
  rules.apply(s, t, [&](int j, int i, float tanh) { factors[j][i] = 1.f - tanh * tanh; }, /*transposed=*/true);
  if (rules.masked) {
    if (mask.is_bool) {
      add_mask_transposed<C, uint8_t>(s, mask, t);
    } else {
      add_mask_transposed<C, float>(s, mask, t);
    }
  }
  const FreshPlace at;
  const int query = place_of(at.column, 0);
  float lse[4], lost[4];
  load_four(statistics.lse + query, lse);
  load_four(statistics.lost + query, lost);
  uint32_t queries = 0, keys[2] = {};
  store_kept<C>(to, at, rules, kept, [&](int i, int j, bool is_kept) {
    const bool hidden = t.partial && !t.sees(query + i, place_of(at.row, j));
    const float exponent = hidden ? -INFINITY : s[j][i] - lse[i] - lost[i];
    const bool exists = exponent != -INFINITY;
    // Above 0 by rounding alone, which of very large scores is enough for an infinity.
    const float probability = natural_exp(-fabsf(exponent));
    queries |= uint32_t{exists} << i;
    keys[j / 4] |= uint32_t{exists} << j % 4;
    if constexpr (C::kRules == kMasks) return exists ? probability : -0.f;
    factors[j][i] = exists ? probability * factors[j][i] : -0.f;
    return exists && is_kept ? probability * rules.dropout_scale : 0.f;
  });
  if (!rules.masked) return;
  alive_queries.mark(query, queries);
#pragma unroll
  for (int g = 0; g < 2; ++g) alive_keys.mark(place_of(at.row, 4 * g), keys[g]);
}

/// dS over P, from dP of what dropout has left.
template <typename C>
FLASH_ATTN_DEVICE void store_extended_gradients(float* to, const float (&dp)[kRows][C::kCols], const Factors& factors,
                                                const ScoreRules& rules, const typename C::Statistics& statistics,
                                                const Kept<kQueries, kKeys>& kept) {
  const FreshPlace at;
  float delta[4];
  load_four(statistics.delta + place_of(at.column, 0), delta);
  store_kept<C>(to, at, rules, kept, [&](int i, int j, bool is_kept) {
    const float of_p = is_kept ? dp[j][i] * rules.dropout_scale : 0.f;
    return __float_as_uint(factors[j][i]) == 0x80000000u ? 0.f : factors[j][i] * (of_p - delta[i]);
  });
}

}  // namespace
}  // namespace flash_attn::cuda::universal::float32
