// Backward for float32 in one kernel: a block that owns keys, as sm80/fp32/backward has them, also adds what its keys
// give to dQ: 5 products instead of 7. dS goes through shared memory, because dQ sums it up over keys:
//
//   wait for the tile     S = K Q^T     P = exp(S - lse)     dV += P dO     dP = V dO^T     dS = P (dP - delta)
//                         largest dS    dS to shared memory  dK += dS Q     dQ^T = K^T dS, added to global memory
//
// All dS of a warpgroup (64 keys) have one power of two, which both products can bear: the four warps exchange their
// largest. Sums over the keys of a warpgroup leave the tensor core. With softcap, ALiBi, attn_mask or dropout dP comes
// before P.
#pragma once

#include "../../sm80/fp32/backward/kernel.h"
#include "../hopper/stmatrix.h"
#include "exponent.h"
#include "products.h"

namespace flash_attn::cuda::sm90::fp32 {

/// Config: a sm80::fp32::BackwardConfig that owns keys.
template <typename Base>
struct GradientsConfig : Base {
  static constexpr int kWarpgroups = Base::kWarps / 4;
  // dS takes the place of a tile of dO, of which a single warpgroup knows when it is done with it.
  static constexpr bool kOwnPlace = kWarpgroups > 1;
  static constexpr int kDs = Base::kStreamed + Base::kStages * Base::kStageBytes;
  static constexpr int kDsBytes = 4 * Base::kBlockN * 64;  // of a warpgroup
  static constexpr int kSharedBytes = Base::kSharedBytes + (kOwnPlace ? kWarpgroups * kDsBytes : 0);
  static_assert(Base::kWithDx && Base::kWithDy && Base::kBlockM == 64 * kWarpgroups &&
                Base::kHeadDim == 64 * kWarpgroups);
};

template <typename Config>
struct GradientsBlock : sm80::fp32::BackwardBlock<Config> {
  using Base = sm80::fp32::BackwardBlock<Config>;
  using Base::Base, Base::tile, Base::p, Base::params, Base::shared, Base::step, Base::block, Base::head, Base::kNTiles,
      Base::kBlockM, Base::kBlockN, Base::x_unit, Base::y_unit, Base::dx, Base::dy, Base::lane, Base::warp;
  using typename Base::Pairs, typename Base::Scores;
  static constexpr int kWarpgroups = Config::kWarpgroups;
  using DqSums = FlatScores<kNTiles>[kWarpgroups];  // of the keys of each warpgroup

  SM80_DEVICE int warpgroup() const { return warp() / 4; }

  SM80_DEVICE uint32_t ds_of(int of_warpgroup) const {
    const uint32_t first = Config::kOwnPlace ? shared + Config::kDs : this->stage(step) + Config::kTileBytes;
    return first + of_warpgroup * Config::kDsBytes;
  }

  /// Rows become queries, columns the warpgroup's keys.
  SM80_DEVICE void store_ds(const Pairs& ds, int at) const {
    const int row = at / 16 * 8 + at % 8, chunk = warp() % 4 * 2 + at / 8 % 2;  // of the lane's matrix
    const uint32_t to = ds_of(warpgroup()) + row * 128 + ((chunk ^ row) % 8 << 4);
#pragma unroll
    for (int k = 0; k < kNTiles / 2; ++k) {
      stmatrix_x4_transposed(to + k * 16 * 128, ds[k][0].high);
      if constexpr (!Config::Products::kReduced) {
        stmatrix_x4_transposed(to + kBlockN * 128 + k * 16 * 128, ds[k][0].low);
      }
    }
  }

  /// A warpgroup computes 64 columns.
  SM80_DEVICE void start_dq(DqSums& sums) const {
    const uint32_t keys = shared + Config::kX + warpgroup() * (kBlockM * 128);
#pragma unroll
    for (int g = 0; g < kWarpgroups; ++g) {
      issue_dq<Config::Products::kReduced, kBlockM, Config::kHeadDim / 64, kNTiles>(sums[g], keys + g * (64 * 128),
                                                                                    ds_of(g));
    }
    wgmma_commit();
  }

  SM80_DEVICE void finish_dq(DqSums& sums, const float (&units)[kWarpgroups], int at) const {
#pragma unroll
    for (int g = 0; g < kWarpgroups; ++g) wgmma_results(sums[g]);
    const TensorView& view = params.problem.dq;
    const int first = block * kBlockN, column = warp() * 16 + at / 4;
    float* const to = this->others[head].dq + (first + at % 4 * 2) * view.row + column;
    const auto value = [&](int n, int half, int c) {
      const int i = 4 * n + 2 * half + c;
      const float x = sums[0][i] * units[0];
      return kWarpgroups == 2 ? fmaf(sums[kWarpgroups - 1][i], units[kWarpgroups - 1], x) : x;
    };
    if (tile.others - first >= kBlockN && p.head_dim == Config::kHeadDim) {
      float* row = to;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        float* const next = row + view.row;
        add_to(row, value(n, 0, 0));
        add_to(row + 8, value(n, 1, 0));
        add_to(next, value(n, 0, 1));
        add_to(next + 8, value(n, 1, 1));
        row += 8 * view.row;
      }
      return;
    }
    const int rows = tile.others - first - at % 4 * 2;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (8 * n + c < rows && column + 8 * half < p.head_dim) {
            add_to(to + (8 * n + c) * view.row + 8 * half, value(n, half, c));
          }
        }
  }

  SM80_DEVICE static void add_to(float* sum, float x) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(sum), "f"(x) : "memory");
  }

  SM80_DEVICE void process() {
    using Products = typename Config::Products;
    __shared__ float shared_units[kWarpgroups];
    const int at = lane();
    const uint32_t x = this->stage(step), y = x + Config::kTileBytes, statistics = x + Config::kStatistics;
    const int unit_at = block * kBlockN / sm80::fp32::kTileRows;
    const float q_unit = __ldg(this->others[head].x.units + unit_at);
    const float dout_unit = __ldg(this->others[head].y.units + unit_at);
    Scores s, dp;
    this->multiply(s, Config::kX, x);
    if constexpr (Config::kExtended) {
      this->multiply(dp, Config::kY, y);
      this->take_extended(s, dp, x_unit * q_unit, y_unit * dout_unit, statistics, at);
    } else {
      this->take_exponentials(s, x_unit * q_unit * this->scale, statistics, at);
    }
    this->add_to_dy(s, y, dout_unit);
    if constexpr (!Config::kExtended) {
      this->multiply(dp, Config::kY, y);
      this->find_gradients(dp, s, y_unit * dout_unit, statistics, at);
    }
    // All of the warpgroup are done with dO then.
    const int exponent = find_exponent<Config::kWarps>(*this, dp[0], [this] { return warpgroup(); }, 1);
    Pairs ds;
    split_fragments(dp, ds, [&](int, int) { return Base::power_of_2(exponent); });
    const float unit = Base::power_of_2(-exponent);
    store_ds(ds, at);
    if (threadIdx.x % 128 == 0) shared_units[warpgroup()] = unit * x_unit * this->scale;
    async_proxy_fence();
    __syncthreads();  // dS and its units are there
    {
      const float of_dk = fminf(unit * q_unit, 0x1p127f);  // not infinity times 0
      this->add(dx, ds, x, [=](int, int) { return of_dk; });
    }
    DqSums sums;
    wgmma_fence();
    start_dq(sums);
    wgmma_wait<0>();
    float units[kWarpgroups];
#pragma unroll
    for (int g = 0; g < kWarpgroups; ++g) units[g] = fminf(shared_units[g], 0x1p127f);
    finish_dq(sums, units, at);
  }

  SM80_DEVICE void run() {
    this->walk([this] { process(); });
    this->store_gradients();
  }
};

}  // namespace flash_attn::cuda::sm90::fp32
