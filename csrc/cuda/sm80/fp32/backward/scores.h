// What a block of a backward kernel for float32 holds, and P, dS and gradients of a tile; tiles come by what is built
// on it.
#pragma once

#include "../../../../philox.h"
#include "../../softmax.h"
#include "../products.h"
#include "../tiles.h"
#include "config.h"
#include "tile.h"

namespace flash_attn::cuda::sm80::fp32 {

template <typename Config>
struct ShownScores;

/// Whether attn_mask shows nothing of a tile.
template <typename Config>
SM80_DEVICE bool is_hidden(const BackwardKernelParams& params, const BackwardTile& tile, int head, int block) {
  if constexpr (Config::kExtended) {
    constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
    if (params.packed.seen == nullptr) return false;
    const int own = tile.own_begin, other = block * kBlockN;
    uint32_t classes;
    if constexpr (Config::kOfKeys) {
      classes = params.packed.tile_classes<kBlockN, kBlockM>(tile.batch, head, other, own);
    } else {
      classes = params.packed.tile_classes<kBlockM, kBlockN>(tile.batch, head, own, other);
    }
    return (classes & mask::kSeen) == 0;
  }
  return false;
}

/// To the next tile of which attn_mask shows something; behind the last one `head` is head_end.
template <typename Config>
SM80_DEVICE void advance(const BackwardKernelParams& params, const BackwardTile& tile, int& head, int& block) {
  do {
    if (++block < tile.block_end) continue;
    block = tile.block_begin;
    if (++head == tile.head_end) return;
  } while (is_hidden<Config>(params, tile, head, block));
}

template <typename Config>
struct BackwardScores {
  static constexpr int kMTiles = Config::kMTiles, kNTiles = Config::kNTiles, kStages = Config::kStages;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  static constexpr bool kOfKeys = Config::kOfKeys, kWithDx = Config::kWithDx, kWithDy = Config::kWithDy;
  static constexpr bool kExtended = Config::kExtended;
  using Scores = float[kMTiles][kNTiles][4];
  using Pairs = PairFragment[kNTiles / 2][kMTiles];
  using Gradient = float[kMTiles][Config::kHeadDim / 8][4];

  const BackwardKernelParams& params;
  const BackwardTile& tile;
  const ForwardParams& p;
  const uint32_t shared;
  int head, block, step = 0;                 // of others, and how many came before
  float x_unit, y_unit;                      // of this warp's rows
  const float scale;                         // softmax_scale
  float lse[kMTiles][2], delta[kMTiles][2];  // of own query rows
  Gradient dx, dy;                           // dK and dV; or dQ, and nothing; those that the kernel computes
  float slope_sum[2];                        // of own query rows: of dS times distance, this lane's columns

  SM80_DEVICE BackwardScores(const BackwardKernelParams& kernel_params, const BackwardTile& t, uint32_t shared_memory)
      : params(kernel_params),
        tile(t),
        p(kernel_params.problem.forward),
        shared(shared_memory),
        head(t.head_begin),
        block(t.block_begin),
        scale(float(kernel_params.problem.forward.softmax_scale)) {
    x_unit = own_unit(tile.x);
    y_unit = own_unit(tile.y);
    clear(dx);
    clear(dy);
    slope_sum[0] = slope_sum[1] = 0.f;
  }

  // Of this thread; see fresh_thread().
  SM80_DEVICE int lane() const { return int(fresh_thread(step) % 32); }
  SM80_DEVICE int warp() const { return int(fresh_thread(step) / 32); }
  /// Of the block's rows.
  SM80_DEVICE int own_row(int m, int half) const { return warp() * Config::kWarpRows + 16 * m + 8 * half + lane() / 4; }

  /// Of this warp's rows.
  SM80_DEVICE float own_unit(const PlaneRows& rows) const {
    return __ldg(rows.units + (tile.own_begin + min(warp() * Config::kWarpRows, tile.own_rows - 1)) / kTileRows);
  }
  /// Of the sequence's query rows.
  SM80_DEVICE int64_t statistics_place(int of_head) const {
    return int64_t{of_head} * p.total_q + (p.cu_seqlens_q != nullptr ? tile.sequence.q_row : tile.batch * p.seqlen_q);
  }

  SM80_DEVICE uint32_t stage(int number) const {
    return shared + Config::kStreamed + number % kStages * Config::kStageBytes;
  }
  SM80_DEVICE void advance(int& of_head, int& of_block) const {
    fp32::advance<Config>(params, tile, of_head, of_block);
  }

  // -- P and dS

  SM80_DEVICE static float2 statistic(uint32_t from, int n, int at) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from + 32 * n + at % 4 * 8));
    return x;
  }

  /// s = q.k in units of `unit` / softmax_scale becomes P.
  SM80_DEVICE void take_exponentials(Scores& s, float unit, uint32_t statistics, int at) const {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      float2 of_column{0.f, 0.f};
      if constexpr (kOfKeys) of_column = statistic(statistics, n, at);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float row_lse = kOfKeys ? (i % 2 == 0 ? of_column.x : of_column.y) : lse[m][i / 2];
          // Above 0 by rounding alone; P is at most 1, for fp16's sake.
          s[m][n][i] = fast_exp2(fminf(fmaf(s[m][n][i], unit, -row_lse), 0.f) * kLog2E);
        }
    }
    if (is_partial()) hide(s, block * kBlockN, at);
  }

  SM80_DEVICE bool is_partial() const {
    const int first = block * kBlockN;
    return first < tile.full_begin || first + kBlockN > tile.full_end || tile.own_rows < kBlockM;
  }

  /// 0 where own and other row do not exist or have nothing to do with each other.
  SM80_DEVICE void hide(Scores& s, int first, int at) const {
    const int column = first + at % 4 * 2;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int own = own_row(m, r), row = tile.own_begin + own;
        const int low = row + tile.low - column;
        const int high = own < tile.own_rows ? min(row + tile.high, tile.others - 1) - column : -1;
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (8 * n + c < low || 8 * n + c > high) s[m][n][2 * r + c] = 0.f;
          }
        }
      }
    }
  }

  /// dp in units of `unit` becomes dS.
  SM80_DEVICE void find_gradients(Scores& dp, const Scores& probabilities, float unit, uint32_t statistics,
                                  int at) const {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      float2 of_column{0.f, 0.f};
      if constexpr (kOfKeys) of_column = statistic(statistics + 4 * kBlockN, n, at);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float row_delta = kOfKeys ? (i % 2 == 0 ? of_column.x : of_column.y) : delta[m][i / 2];
          dp[m][n][i] = probabilities[m][n][i] * fmaf(dp[m][n][i], unit, -row_delta);
        }
    }
  }

  /// A power of two for each row that brings its largest dS to at least 2^14, if that is no larger than 2^100.
  SM80_DEVICE static void find_row_exponents(const Scores& ds, int (&exponent)[kMTiles][2]) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float largest = 0.f;
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          largest = fmaxf(largest, fmaxf(fabsf(ds[m][n][2 * r]), fabsf(ds[m][n][2 * r + 1])));
        }
        largest = quad_max(largest);
        exponent[m][r] = min(14 + 127 - int(__float_as_uint(largest) >> 23), 100);
      }
    }
  }

  SM80_DEVICE static float power_of_2(int exponent) { return __uint_as_float(uint32_t(127 + exponent) << 23); }

  // -- the same with every rule, see extended.h

  /// From products s and dp to P, of which dropout has taken away, and dS.
  SM80_DEVICE void take_extended(Scores& s, Scores& dp, float s_unit, float dp_unit, uint32_t statistics, int at);
  template <bool kBias>
  SM80_DEVICE void find_extended(Scores& s, Scores& dp, float dp_unit, uint32_t statistics, int at);
  SM80_DEVICE void find_shown(ShownScores<Config>& shown, bool biased, int at) const;
  SM80_DEVICE void add_mask_gradient(const Scores& ds, int at) const;
  SM80_DEVICE void store_slope_sums() const;

  // -- products

  /// s = own rows times those of a tile; `own` is where they begin, from the start of shared memory.
  SM80_DEVICE void multiply(Scores& s, int own, uint32_t other) const {
    Config::Products::template multiply_rows<Config::kHeadDim, Config::kSumSteps, kBlockM, kBlockN>(s, shared + own,
                                                                                                    other, *this);
  }
  template <typename Unit>
  SM80_DEVICE void add(Gradient& sum, const Pairs& pairs, uint32_t other, const Unit& unit) const {
    Config::Products::template add_product<Config::kHeadDim, Config::kAhead>(sum, pairs, other, unit, *this);
  }

  /// dV += P^T dO.
  SM80_DEVICE void add_to_dy(const Scores& probabilities, uint32_t y, float unit) {
    Pairs pairs;
    split_fragments(probabilities, pairs, [](int, int) { return kPScale; });
    unit /= kPScale;
    add(dy, pairs, y, [=](int, int) { return unit; });
  }

  /// dX += dS X'.
  SM80_DEVICE void add_to_dx(const Scores& ds, uint32_t x, float unit) {
    int exponent[kMTiles][2];
    find_row_exponents(ds, exponent);
    Pairs pairs;
    split_fragments(ds, pairs, [&](int m, int half) { return power_of_2(exponent[m][half]); });
    add(dx, pairs, x, [&](int m, int half) {
      return fminf(power_of_2(-exponent[m][half]) * unit, 0x1p127f);  // not infinity times 0
    });
  }

  // -- results

  SM80_DEVICE void store_gradients() const {
    if constexpr (kOfKeys) {
      float dropout_scale = 1.f;
      if constexpr (kExtended) {
        if (p.dropout_p > 0.0) dropout_scale = float(make_dropout(p.rng_state, p.dropout_p).scale);
      }
      if constexpr (kWithDx) store(params.problem.dk, dx, p.head_dim, scale, params.pairs_k);
      if constexpr (kWithDy) store(params.problem.dv, dy, p.head_dim_v, dropout_scale, params.pairs_v);
    } else {
      if constexpr (kExtended) store_slope_sums();
      store(params.problem.dq, dx, p.head_dim, scale, params.pairs_q);
    }
  }

  SM80_DEVICE void store(const TensorView& view, const Gradient& gradient, int64_t columns, float scale,
                         bool pairs) const {
    if (view.data == nullptr) return;
    const bool packed = (kOfKeys ? p.cu_seqlens_k : p.cu_seqlens_q) != nullptr;
    const int64_t first = (kOfKeys ? tile.sequence.k_row : tile.sequence.q_row) + tile.own_begin;
    float* const to = static_cast<float*>(view.data) + (packed ? 0 : tile.batch * view.batch) + first * view.row +
                      (kOfKeys ? tile.kv_head : tile.head_begin) * view.head;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = own_row(m, r), column = lane() % 4 * 2;
        if (row >= tile.own_rows) continue;
#pragma unroll
        for (int d = 0; d < Config::kHeadDim / 8; ++d) {
          store_two(to + row * view.row + 8 * d + column, gradient[m][d][2 * r] * scale,
                    gradient[m][d][2 * r + 1] * scale, int(columns) - 8 * d - column, pairs);
        }
      }
    }
  }
};

}  // namespace flash_attn::cuda::sm80::fp32
