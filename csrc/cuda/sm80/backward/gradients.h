// From products to P and dS on a warp's transposed fragments: element (m, n, i) of lane 4 g + t stands at key
// 16 m + g + 8 (i / 2), query 8 n + 2 t + i % 2 of the warp's.
#pragma once

#include "../../common/scores/probability.h"
#include "../../mask/transposed_bits.h"
#include "../softmax.h"
#include "extended.h"

namespace flash_attn::cuda::sm80 {

SM80_DEVICE uint2 load_transposed(const mask::PackedMask& packed, int64_t cell, int lane) {
  const uint32_t* const from = packed.bits + cell * 32 + lane % 4 * 8 + lane / 8;
  return {__ldg(from), __ldg(from + 4)};
}
SM80_DEVICE uint32_t transposed(uint2 words, int lane) {
  const int odd = lane / 4 % 2;
  return (words.x >> odd & 0x55555555u) | (words.y >> odd & 0x55555555u) << 1;
}

/// Where a warp's fragments begin: query row in its sequence, key in its block.
struct WarpPlace {
  int row, key;
  uint32_t lane;
};

template <typename Config>
struct GradientRules {
  using Element = typename Config::Element;
  static constexpr int kKeyTiles = Config::kKeyTiles, kQueryTiles = Config::kQueryTiles;
  using Scores = float[kKeyTiles][kQueryTiles][4];
  using Fragments = uint32_t[Config::kWarpQueries / 16][kKeyTiles][4];

  const BackwardTile& tile;
  const BackwardKernelParams& params;

  SM80_DEVICE GradientRules(const BackwardKernelParams& kernel_params, const BackwardTile& t)
      : tile(t), params(kernel_params) {}

  SM80_DEVICE static float2 statistic(uint32_t from, int n, uint32_t lane) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from + 32 * n + lane % 4 * 8));
    return x;
  }

  /// What dP^T of a column of fragments is added to: -delta, unless dropout comes between.
  SM80_DEVICE static float2 start(uint32_t minus_delta, int n, uint32_t lane) {
    return Config::kDrops ? float2{0.f, 0.f} : statistic(minus_delta, n, lane);
  }

  /// Whether some query of the warp does not see some key of it.
  SM80_DEVICE bool is_partial(const WarpPlace& at) const {
    const int last_key = at.key + Config::kWarpKeys - 1, last_row = at.row + Config::kWarpQueries - 1;
    return (last_key >= tile.keys) | (last_row >= tile.row_end) | (at.key - last_row < tile.low) |
           (last_key - at.row > tile.high);
  }

  /// Whether no query of the warp sees a key of it.
  SM80_DEVICE bool is_blind(const WarpPlace& at) const {
    const int last_key = at.key + Config::kWarpKeys - 1, last_row = at.row + Config::kWarpQueries - 1;
    const bool before = (at.key >= tile.keys) | (last_key - at.row < tile.low);
    return before || at.key - last_row > tile.high;
  }

  /// Which queries a lane's key sees, as columns of the fragments.
  struct SeenQueries {
    int first, last;
    SM80_DEVICE bool hold(int n, int i) const { return (8 * n + i % 2 >= first) & (8 * n + i % 2 <= last); }
  };
  SM80_DEVICE SeenQueries seen_queries(const WarpPlace& at, int m, int half) const {
    const int key = at.key + 16 * m + 8 * half + int(at.lane / 4), row = at.row + int(at.lane % 4 * 2);
    if (key >= tile.keys) return {1, 0};
    return {key - tile.high - row, min(key - tile.low, tile.row_end - 1) - row};
  }

  using Bits = ScoreBits<kKeyTiles, kQueryTiles>;
  using Kept = KeptScores<true, kKeyTiles, kQueryTiles / 2>;

  /// `shown`, `kept`: of the kernel's rules, if they have them. kPartial: other bounds hide something as well.
  template <bool kPartial>
  SM80_DEVICE void apply_to(const Scores& s, const Scores& dp, uint32_t minus_lse, uint32_t minus_delta,
                            const WarpPlace& at, const Bits& shown, const Kept& kept, Fragments& p_t,
                            Fragments& ds_t) const {
    constexpr bool kMasks = Config::kMasks, kDrops = Config::kDrops;
    SeenQueries seen[kKeyTiles][2];
    if constexpr (kPartial) {
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) seen[m][0] = seen_queries(at, m, 0), seen[m][1] = seen_queries(at, m, 1);
    }
    const float dropout_scale = kDrops ? tile.dropout_scale : 1.f;
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
      const float2 lse = statistic(minus_lse, n, at.lane);
      const float2 delta = kDrops ? statistic(minus_delta, n, at.lane) : float2{};
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) {
        float x[4], dx[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = cuda::probability(fmaf(s[m][n][i], params.scale_log2, i % 2 == 0 ? lse.x : lse.y));
          float gradient = dp[m][n][i];
          if constexpr (kDrops) {
            gradient = fmaf(kept.hold(m, n, i) ? gradient : 0.f, dropout_scale, i % 2 == 0 ? delta.x : delta.y);
          }
          dx[i] = x[i] * gradient;
          if constexpr (kPartial || kMasks) {
            const bool sees = kMasks ? shown.hold(m, n, i) : seen[m][i / 2].hold(n, i);
            x[i] = sees ? x[i] : 0.f;
            dx[i] = sees ? dx[i] : 0.f;
          }
          if constexpr (kDrops) x[i] = kept.hold(m, n, i) ? x[i] : 0.f;
        }
        p_t[n / 2][m][n % 2 * 2] = pack<Element>(x[0], x[1]);
        p_t[n / 2][m][n % 2 * 2 + 1] = pack<Element>(x[2], x[3]);
        ds_t[n / 2][m][n % 2 * 2] = pack<Element>(dx[0], dx[1]);
        ds_t[n / 2][m][n % 2 * 2 + 1] = pack<Element>(dx[2], dx[3]);
      }
    }
  }

  /// Draws for one head's scores; all bits where nothing is dropped. Kernels of Rules::kDropout have yet to exchange()
  /// them.
  SM80_DEVICE void draw_kept(Kept& kept, int head, const WarpPlace& at) const {
    const ForwardParams& p = params.problem.forward;
    if (p.dropout_p > 0.0) {
      const int64_t batch_head = int64_t{tile.batch} * p.num_heads + head;
      if constexpr (Config::kExtended) {
        kept.draw(tile.dropout, batch_head, at.row, tile.n_begin + at.key, int(at.lane));
      } else {
        kept.draw_own(tile.dropout, batch_head, at.row, tile.n_begin + at.key, int(at.lane));
      }
    } else {
      kept.set_all();
    }
  }

  /// A packed mask's bits as they lie, see packed_mask.h: a word is of sixteen queries.
  using MaskWords = uint2[kQueryTiles / 2];
  SM80_DEVICE uint2 load_word(int q, int head, const WarpPlace& at) const {
    const mask::PackedMask& packed = params.packed;
    const int row_cell = min(at.row / mask::kCellRows + q, packed.row_cells - 1);
    const int col_cell = min((tile.n_begin + at.key) / mask::kCellCols, packed.col_cells - 1);
    return load_transposed(packed, packed.cell(tile.batch, head, row_cell, col_cell), int(at.lane));
  }
  SM80_DEVICE void load_words(MaskWords& words, int head, const WarpPlace& at) const {
#pragma unroll
    for (int q = 0; q < kQueryTiles / 2; ++q) words[q] = load_word(q, head, at);
  }

  SM80_DEVICE void unpack(Bits& shown, int q, uint2 word, const WarpPlace& at) const {
    // Four bits for each eight keys, which stand eight apart in a word.
    uint32_t x = transposed(word, int(at.lane)) >> ((tile.n_begin + at.key) % mask::kCellCols / 2) & 0xffff;
    x = (x | x << 8) & 0x00ff00ffu;
    x = (x | x << 4) & 0x0f0f0f0fu;
    shown.word[q / 2] = (q % 2 == 0 ? 0 : shown.word[q / 2]) | x << (4 * (q % 2));
  }

  /// Which scores exist by lengths, causal, window and what of attn_mask is packed.
  SM80_DEVICE void find_shown(Bits& shown, int head, const WarpPlace& at) const {
    shown.set_all();
    if (params.packed.seen != nullptr) {
#pragma unroll
      for (int q = 0; q < kQueryTiles / 2; ++q) unpack(shown, q, load_word(q, head, at), at);
    }
    limit(shown, at);
  }
  /// The same of a mask whose words are here already.
  SM80_DEVICE void find_shown(Bits& shown, const MaskWords& words, const WarpPlace& at) const {
#pragma unroll
    for (int q = 0; q < kQueryTiles / 2; ++q) unpack(shown, q, words[q], at);
    limit(shown, at);
  }
  SM80_DEVICE void limit(Bits& shown, const WarpPlace& at) const {
    const int rows = int(tile.sequence.seqlen_q), keys = tile.keys, low = tile.low, high = tile.high;
    if (!is_partial(at) && at.row + Config::kWarpQueries <= rows) return;
    const int key = at.key + int(at.lane / 4), row = at.row + int(at.lane % 4 * 2);
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int q = 8 * n + i % 2, k = 16 * m + i / 2 * 8, distance = key + k - row - q;
          const bool shows = (row + q < rows) & (key + k < keys) & (distance >= low) & (distance <= high);
          if (!shows) shown.word[n / 4] &= ~(1u << Bits::bit(m, n, i));
        }
      }
    }
  }

  /// The same with every rule. Returns the lane's sum of dS times the distance of its query and key. `visit(m, n, i,
  /// dS)` sees the gradients of scores.
  template <typename Visit>
  SM80_DEVICE float apply_extended(Scores& s, const Scores& dp, uint32_t minus_lse, uint32_t minus_delta, int head,
                                   const WarpPlace& at, const Bits& shown, const Kept& kept, Fragments& p_t,
                                   Fragments& ds_t, const Visit& visit) const {
    scale_scores(s);
    const MaskView& mask = params.problem.forward.mask;
    // By a vote ptxas knows that all lanes agree; otherwise it spills.
    if (mask.data != nullptr &&
        __any_sync(~0u, adds_values<Config::kWarpQueries, Config::kWarpKeys>(mask, params.packed, tile.batch, head,
                                                                             at.row, tile.n_begin + at.key))) {
      return apply_rules<true>(s, dp, minus_lse, minus_delta, head, at, shown, kept, p_t, ds_t, visit);
    }
    return apply_rules<false>(s, dp, minus_lse, minus_delta, head, at, shown, kept, p_t, ds_t, visit);
  }

  /// Scores in natural units: a mask of the smallest number times log2(e) would be -inf.
  SM80_DEVICE void scale_scores(Scores& s) const {
    const float scale = params.scale_log2 * kLn2, softcap = float(params.problem.forward.softcap);
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] *= softcap > 0.f ? params.scale_over_softcap : scale;
    if (softcap > 0.f) {
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][n][i] = softcap * tanh_by_exp2(s[m][n][i]);
    }
  }

  template <bool kBias, typename Visit>
  SM80_DEVICE float apply_rules(const Scores& s, const Scores& dp, uint32_t minus_lse, uint32_t minus_delta, int head,
                                const WarpPlace& at, const Bits& shown, const Kept& kept, Fragments& p_t,
                                Fragments& ds_t, const Visit& visit) const {
    const ForwardParams& p = params.problem.forward;
    const int key = at.key + int(at.lane / 4), row = at.row + int(at.lane % 4 * 2);
    const float slope = slope_of(p, tile.batch, head), dropout_scale = tile.dropout_scale;
    const float offset = float(row + int(tile.sequence.diagonal) - tile.n_begin - key);
    const float inverse_softcap = params.inverse_softcap;
    const bool is_float32 = p.mask.dtype == DType::kFloat32;
    BiasColumn<kKeyTiles> bias[2];
    const auto load_bias = [&](int n) {
      const auto is_shown = [&](int m, int i) { return shown.hold(m, n, i); };
      const int64_t place = (row + 8 * n) * p.mask.row + (tile.n_begin + key) * p.mask.col;
      if (is_float32) {
        bias[n % 2].template load<uint32_t>(mask_of<uint32_t>(p.mask, tile.batch, head) + place, p.mask.row, p.mask.col,
                                            is_shown);
      } else {
        bias[n % 2].template load<uint16_t>(mask_of<uint16_t>(p.mask, tile.batch, head) + place, p.mask.row, p.mask.col,
                                            is_shown);
      }
    };
    // A column ahead where registers allow.
    constexpr int kAccumulators = 8 * kKeyTiles * Config::kColumnTiles;
    constexpr bool kAhead = kAccumulators < 128 && kAccumulators + 8 * kKeyTiles * kQueryTiles < 192;
    if constexpr (kBias && kAhead) load_bias(0);
    float slope_sum = 0.f;
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
      if constexpr (kBias && kAhead) {
        if (n + 1 < kQueryTiles) load_bias(n + 1);
      } else if constexpr (kBias) {
        load_bias(n);
      }
      const float2 lse = statistic(minus_lse, n, at.lane), delta = statistic(minus_delta, n, at.lane);
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) {
        float x[4], dx[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float distance = fabsf(offset + float(8 * n + i % 2 - 16 * m - i / 2 * 8));
          float score = fmaf(-slope, distance, s[m][n][i]);
          bool exists = shown.hold(m, n, i);
          if constexpr (kBias) {
            const float b = bias[n % 2].template get<Element>(m, i, is_float32);
            exists = exists & (b != -INFINITY);
            score += b;
          }
          const bool is_kept = kept.hold(m, n, i);
          const float exponential = cuda::probability((score + (i % 2 == 0 ? lse.x : lse.y)) * kLog2E);
          const float probability = exists ? exponential : 0.f;
          const float gradient = fmaf(is_kept ? dp[m][n][i] : 0.f, dropout_scale, i % 2 == 0 ? delta.x : delta.y);
          const float ds = exists ? probability * gradient : 0.f;
          x[i] = is_kept ? probability : 0.f;
          slope_sum = fmaf(ds, distance, slope_sum);
          visit(m, n, i, ds);
          const float tanh = s[m][n][i] * inverse_softcap;
          dx[i] = exists ? ds * fmaf(-tanh, tanh, 1.f) : 0.f;
        }
        p_t[n / 2][m][n % 2 * 2] = pack<Element>(x[0], x[1]);
        p_t[n / 2][m][n % 2 * 2 + 1] = pack<Element>(x[2], x[3]);
        ds_t[n / 2][m][n % 2 * 2] = pack<Element>(dx[0], dx[1]);
        ds_t[n / 2][m][n % 2 * 2 + 1] = pack<Element>(dx[2], dx[3]);
      }
    }
    return slope_sum;
  }

  SM80_DEVICE void apply(const Scores& s, const Scores& dp, uint32_t minus_lse, uint32_t minus_delta,
                         const WarpPlace& at, const Bits& shown, const Kept& kept, Fragments& p_t,
                         Fragments& ds_t) const {
    if (!Config::kMasks && is_partial(at)) {
      apply_to<true>(s, dp, minus_lse, minus_delta, at, shown, kept, p_t, ds_t);
    } else {
      apply_to<false>(s, dp, minus_lse, minus_delta, at, shown, kept, p_t, ds_t);
    }
  }
};

}  // namespace flash_attn::cuda::sm80
