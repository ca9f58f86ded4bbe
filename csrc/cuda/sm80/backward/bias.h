// An additive attn_mask in the backward kernels of Rules::kBias. A warp's share of P's tile in shared memory, which
// nobody reads between two steps, holds the biases of its scores until P comes: a row of 32 keys for each query, by
// cp.async from where the mask lies; ldmatrix transposes them.
#pragma once

#include <cstring>

#include "../copy_part.h"
#include "gradients.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
struct BiasTile {
  using Tile = SharedTile<Config::kBlockM>;  // (keys, queries), as P
  static constexpr int kOctets = Config::kWarpKeys / 8;

  /// Of eight keys of a query of the warp, in the place of as many queries of a key.
  SM80_DEVICE static uint32_t offset(int warp_q, const WarpPlace& at, int query, int octet) {
    return Tile::offset(at.key + query % Config::kWarpKeys,
                        warp_q * (Config::kWarpQueries / 8) + query / Config::kWarpKeys * kOctets + octet);
  }

  /// `from`: of the warp's first query and key. Of as many as exist; the others become 0.
  template <typename Element>
  SM80_DEVICE static void load(uint32_t tile, int warp_q, const WarpPlace& at, const Element* from, int64_t row_stride,
                               int queries, int keys) {
    const int octet = int(at.lane) % kOctets;
    constexpr int kStep = 32 / kOctets;
    if (queries >= Config::kWarpQueries && keys >= Config::kWarpKeys) {  // nearly always
      const Element* piece = from + int(at.lane) / kOctets * row_stride + 8 * octet;
#pragma unroll
      for (int i = 0; i < Config::kWarpQueries; i += kStep, piece += kStep * row_stride) {
        cp_async_16(tile + offset(warp_q, at, int(at.lane) / kOctets + i, octet), piece);
      }
    } else {
      const int bytes = 2 * min(max(keys - 8 * octet, 0), 8);
#pragma unroll 1
      for (int query = int(at.lane) / kOctets; query < Config::kWarpQueries; query += kStep) {
        const bool exists = query < queries && bytes > 0;
        cp_async_part(tile + offset(warp_q, at, query, octet), exists ? from + query * row_stride + 8 * octet : from,
                      exists ? bytes : 0);
      }
    }
    cp_async_commit();
  }

  /// Of column n of the fragments: pairs of queries, of keys g, g + 8, g + 16, g + 24 of the warp.
  SM80_DEVICE static void read(uint32_t tile, int warp_q, const WarpPlace& at, int n, uint32_t (&pairs)[4]) {
    ldmatrix_x4_trans(pairs, tile + offset(warp_q, at, 8 * n + int(at.lane) % 8, int(at.lane) / 8));
  }
};

/// Whether one instruction compares a pair.
template <typename Element>
constexpr bool kComparesPairs =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    std::is_same_v<Element, __half>;
#else
    true;
#endif

/// All bits of those halves of a pair that are not -inf.
template <typename Element>
SM80_DEVICE uint32_t finite_halves(uint32_t pair, Element) {
  using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
  constexpr uint32_t kInfinities = std::is_same_v<Element, __half> ? 0xfc00fc00u : 0xff80ff80u;
  Pair x, infinities;
  memcpy(&x, &pair, 4), memcpy(&infinities, &kInfinities, 4);
  return __hneu2_mask(x, infinities);
}

template <typename Config>
struct BiasRules : GradientRules<Config> {
  using Base = GradientRules<Config>;
  using Base::Base, Base::kKeyTiles, Base::kQueryTiles, Base::params, Base::tile;
  using typename Base::Element, typename Base::Fragments, typename Base::Scores, typename Base::SeenQueries;
  using Bias = BiasTile<Config>;

  SM80_DEVICE void load(uint32_t p_tile, int warp_q, int head, const WarpPlace& at) const {
    const MaskView& mask = params.problem.forward.mask;
    int64_t row_stride = mask.row;
    asm volatile("" : "+l"(row_stride));  // its multiples are not worth registers across the walk
    const Element* const from =
        mask_of<Element>(mask, tile.batch, head) + int64_t{at.row} * row_stride + tile.n_begin + at.key;
    Bias::load(p_tile, warp_q, at, from, row_stride, int(tile.sequence.seqlen_q) - at.row, tile.keys - at.key);
  }

  SM80_DEVICE void apply(const Scores& s, const Scores& dp, uint32_t minus_lse, uint32_t p_tile, int warp_q, int head,
                         const WarpPlace& at, Fragments& p_t, Fragments& ds_t) const {
    cp_async_wait<0>();
    __syncwarp();  // all of the warp's biases are there
    const bool partial = this->is_partial(at);
    if (params.adds_mask_gradient) {
      if (partial) {
        apply_to<true, true>(s, dp, minus_lse, p_tile, warp_q, head, at, p_t, ds_t);
      } else {
        apply_to<false, true>(s, dp, minus_lse, p_tile, warp_q, head, at, p_t, ds_t);
      }
    } else if (partial) {
      apply_to<true, false>(s, dp, minus_lse, p_tile, warp_q, head, at, p_t, ds_t);
    } else {
      apply_to<false, false>(s, dp, minus_lse, p_tile, warp_q, head, at, p_t, ds_t);
    }
  }

 private:
  /// Of the warp's first query and key, less the lane's: in the gradient of attn_mask.
  SM80_DEVICE float* gradient(int head, const WarpPlace& at, int64_t row_size) const {
    const MaskView& mask = params.problem.forward.mask;
    const int64_t slice = (mask.batch_size == 1 ? 0 : tile.batch) * mask.head_size + (mask.head_size == 1 ? 0 : head);
    return static_cast<float*>(params.problem.dmask) + (slice * mask.row_size + at.row + at.lane % 4 * 2) * row_size +
           tile.n_begin + at.key + at.lane / 4;
  }

  /// kGradient: dS is added to attn_mask's gradient too.
  template <bool kPartial, bool kGradient>
  SM80_DEVICE void apply_to(const Scores& s, const Scores& dp, uint32_t minus_lse, uint32_t p_tile, int warp_q,
                            int head, const WarpPlace& at, Fragments& p_t, Fragments& ds_t) const {
    constexpr bool kByPairs = !kGradient && kComparesPairs<Element>;  // who is hidden is asked of packed P and dS
    SeenQueries seen[kKeyTiles][2];
    if constexpr (kPartial) {
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m)
        seen[m][0] = this->seen_queries(at, m, 0), seen[m][1] = this->seen_queries(at, m, 1);
    }
    const float scale = params.scale_log2 * kLn2;
    [[maybe_unused]] int64_t row_size = params.problem.forward.mask.col_size;
    asm volatile("" : "+l"(row_size));  // as in load()
    [[maybe_unused]] float* to = kGradient ? gradient(head, at, row_size) : nullptr;
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
      const float2 lse = this->statistic(minus_lse, n, at.lane);
      uint32_t bias[4];
      Bias::read(p_tile, warp_q, at, n, bias);
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) {
        float x[4], dx[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t pair = bias[2 * m + i / 2];
          const float b = i % 2 == 0 ? low_half(pair, Element()) : high_half(pair, Element());
          x[i] = cuda::probability((fmaf(s[m][n][i], scale, b) + (i % 2 == 0 ? lse.x : lse.y)) * kLog2E);
          dx[i] = x[i] * dp[m][n][i];
          bool sees = !kPartial || seen[m][i / 2].hold(n, i);
          if constexpr (!kByPairs) sees = sees & (b != -INFINITY);
          if constexpr (kPartial || !kByPairs) x[i] = sees ? x[i] : 0.f, dx[i] = sees ? dx[i] : 0.f;
          if constexpr (kGradient) {
            if (sees) atomicAdd(to + i % 2 * row_size + 16 * m + i / 2 * 8, dx[i]);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // of the keys
          const uint32_t sees = kByPairs ? finite_halves(bias[2 * m + half], Element()) : ~0u;
          p_t[n / 2][m][n % 2 * 2 + half] = pack<Element>(x[2 * half], x[2 * half + 1]) & sees;
          ds_t[n / 2][m][n % 2 * 2 + half] = pack<Element>(dx[2 * half], dx[2 * half + 1]) & sees;
        }
      }
      if constexpr (kGradient) to += 8 * row_size;
    }
  }
};

}  // namespace flash_attn::cuda::sm80
