// Backward for float32 in one kernel: a block that owns 64 keys also adds what they give to dQ, 5 products instead of
// 7. dS goes through shared memory, because dQ sums it up over keys:
//
//   S = K Q^T     P = exp(S - lse)     dV += P dO     the next tile is loaded     dP = V dO^T     dS = P (dP - delta)
//   barrier: the largest dS of all warps are there
//   dS to shared memory     dK += dS Q
//   barrier: dS is there, and the next tile; all are done with this one, whose stage the tile after the next gets
//   dQ = dS^T K, added to global memory
//
// All dS of a tile have one power of two, which both products can bear. The next tile's dS comes behind the next
// barrier of the first kind, so that all are done with this one's. With softcap, ALiBi, attn_mask or dropout dP comes
// before P.
//
// The loads stand where they do because they hold branches: ptxas, which reads fragments of one product ahead while it
// computes another, does not do so across them, for which registers of three blocks an SM would not be enough.
#pragma once

#include "../one_sum.h"
#include "kernel.h"

namespace flash_attn::cuda::sm80::fp32 {

/// Base: a BackwardConfig that owns keys.
template <typename Base>
struct AllGradientsConfig : Base {
  // Rows are keys, columns queries: the high halves, then the low ones.
  using GradientTile = SharedTile<2 * Base::kBlockN>;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  // No more fit into the shared memory of GPUs before Hopper.
  static constexpr int kBlocksPerSm = Base::kBlocksPerSm < 2 ? Base::kBlocksPerSm : 2;
#endif
  static constexpr int kDs = Base::kStreamed + Base::kStages * Base::kStageBytes;
  static constexpr int kSharedBytes = kDs + Base::kBlockM * GradientTile::kRowBytes;
  // dQ of a tile is shared out to the warps: 16 columns and 16 kQueryTiles rows each.
  static constexpr int kColumnSteps = Base::kHeadDim / 16;
  static constexpr int kQueryTiles = Base::kBlockN / 16 / (Base::kWarps / kColumnSteps);
  static_assert(Base::kWithDx && Base::kWithDy && Base::kStages == 2 && Base::kBlockM == kTileRows);
  static_assert(Base::kMTiles == 1 && Base::kWarps == 4 &&
                kQueryTiles * Base::kWarps * 256 == Base::kBlockN * Base::kHeadDim);
};

template <typename Config>
struct AllGradientsBlock : BackwardBlock<Config> {
  using Base = BackwardBlock<Config>;
  using Base::Base, Base::tile, Base::p, Base::params, Base::shared, Base::step, Base::block, Base::head, Base::kNTiles,
      Base::kBlockN, Base::x_unit, Base::y_unit, Base::dx, Base::dy, Base::lane, Base::warp, Base::stage, Base::scale,
      Base::others;
  using typename Base::Gradient, typename Base::Pairs, typename Base::Scores;
  using GradientTile = typename Config::GradientTile;
  using PairTile = SharedTile<2 * Config::kHeadDim>;
  static constexpr bool kReduced = Config::Products::kReduced;
  static constexpr int kQueryTiles = Config::kQueryTiles;
  using DqSums = float[kQueryTiles][2][4];

  // -- products

  /// dp = V dO^T.
  SM80_DEVICE void multiply_values(Scores& dp, uint32_t y, int at) const {
    multiply_rows_in_one_sum<kReduced, Config::kHeadDim, Config::kSumSteps>(
        dp, address_by_rows<PairTile>(shared + Config::kY, warp() * Config::kWarpRows, at),
        address_by_columns<PairTile>(y, 0, at));
  }
  SM80_DEVICE void add_pairs(Gradient& sum, const Pairs& pairs, uint32_t other, float unit, int at) const {
    add_product_in_one_sum<kReduced, Config::kHeadDim>(sum, pairs, address_by_rows<PairTile>(other, 0, at),
                                                       [=](int, int) { return unit; });
  }
  SM80_DEVICE void add_to_dv(const Scores& probabilities, uint32_t y, float unit, int at) {
    Pairs pairs;
    split_fragments(probabilities, pairs, [](int, int) { return kPScale; });
    add_pairs(dy, pairs, y, unit / kPScale, at);
  }

  // -- dS

  SM80_DEVICE static uint32_t largest_of(const Scores& ds) {
    uint32_t largest = 0;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(ds[0][n][i]) & 0x7fffffffu);
    return __reduce_max_sync(~0u, largest);
  }

  /// A power of two that brings the largest dS to at least 2^14, if that is no larger than 2^100.
  SM80_DEVICE static int exponent_of(const uint4& maxima) {
    const uint32_t largest = max(max(maxima.x, maxima.y), max(maxima.z, maxima.w));
    return min(14 + 127 - int(largest >> 23), 100);
  }

  SM80_DEVICE void store_ds(const Pairs& ds, int at) const {
#pragma unroll
    for (int k = 0; k < kNTiles / 2; ++k) {
      const int row = warp() * Config::kWarpRows;
      store_fragment<GradientTile>(shared + Config::kDs, row, k, at, ds[k][0].high);
      if constexpr (!kReduced)
        store_fragment<GradientTile>(shared + Config::kDs, row, k + kNTiles / 2, at, ds[k][0].low);
    }
  }

  // -- dQ

  SM80_DEVICE int column_step() const {
    return Config::kWarps == Config::kColumnSteps ? warp() : warp() % Config::kColumnSteps;
  }
  SM80_DEVICE int first_query_tile() const {
    return Config::kWarps == Config::kColumnSteps ? 0 : warp() / Config::kColumnSteps * kQueryTiles;
  }

  /// The warp's rows and columns of dS^T K.
  SM80_DEVICE void multiply_keys(DqSums& sum, int at) const {
    DqSums rest;
    clear(sum);
    clear(rest);
    const uint32_t ds = address_by_columns<GradientTile>(shared + Config::kDs, 0, at);
    const uint32_t keys = PairTile::along(address_by_rows<PairTile>(shared + Config::kX, 0, at), column_step());
    const int first = first_query_tile();
#pragma unroll
    for (int k = 0; k < Config::kBlockM / 16; ++k) {
      PairFragment b;
      load_pair_trans<Config::kHeadDim, kReduced>(b, keys, 0, 16 * k);
      const uint32_t rows = ds + 16 * k * GradientTile::kRowBytes;
#pragma unroll
      for (int m = 0; m < kQueryTiles; ++m) {
        PairFragment a;
        ldmatrix_x4_trans(a.high, GradientTile::along(rows, first + m));
        if constexpr (!kReduced) ldmatrix_x4_trans(a.low, GradientTile::along(rows, first + m + kNTiles / 2));
        mma_pair<kReduced>(sum[m][0], rest[m][0], a, b, 0);
        mma_pair<kReduced>(sum[m][1], rest[m][1], a, b, 1);
      }
    }
    add(sum, rest);
  }

  SM80_DEVICE static void add_to(float* sum, float x) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(sum), "f"(x) : "memory");
  }
  SM80_DEVICE static void add_two_to(float* sum, float x, float y) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(sum), "f"(x), "f"(y) : "memory");
#else
    add_to(sum, x);
    add_to(sum + 1, y);
#endif
  }

  SM80_DEVICE void add_to_dq(const DqSums& dq, float unit, int at) const {
    const TensorView& view = params.problem.dq;
    const int first = block * kBlockN + 16 * first_query_tile() + at / 4, column = column_step() * 16 + at % 4 * 2;
    float* row = others[head].dq + first * view.row + column;
    if (tile.others - block * kBlockN >= kBlockN && p.head_dim == Config::kHeadDim && params.pairs_q) {
#pragma unroll
      for (int m = 0; m < kQueryTiles; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r, row += 8 * view.row) {
#pragma unroll
          for (int j = 0; j < 2; ++j) add_two_to(row + 8 * j, dq[m][j][2 * r] * unit, dq[m][j][2 * r + 1] * unit);
        }
      return;
    }
    const int rows = tile.others - first, columns = int(p.head_dim) - column;
#pragma unroll
    for (int m = 0; m < kQueryTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r, row += 8 * view.row)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (16 * m + 8 * r < rows && 8 * j + c < columns) add_to(row + 8 * j + c, dq[m][j][2 * r + c] * unit);
          }
  }

  // -- the loop over tiles

  /// In shared memory, as registers are few.
  struct Shared {
    uint4 maxima;          // of dS, of each warp
    float k_unit, v_unit;  // of the block's keys
    float dq_unit;         // what a number of dQ is of the tile's sums
  };

  /// Of the tile's rows, read where it is needed.
  SM80_DEVICE float unit_of(const PlaneRows& rows) const {
    float unit;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(unit) : "l"(rows.units + block * kBlockN / kTileRows));
    return unit;
  }
  SM80_DEVICE float q_unit() const { return unit_of(others[head].x); }
  SM80_DEVICE float dout_unit() const { return unit_of(others[head].y); }

  SM80_DEVICE void process(volatile Shared& keys) {
    __shared__ __align__(16) uint32_t maxima[4];
    const int at = lane();
    const uint32_t x = stage(step), y = x + Config::kTileBytes, statistics = x + Config::kStatistics;
    Scores s, dp;
    this->multiply(s, Config::kX, x);  // by the operations of the forward pass
    if constexpr (Config::kExtended) {
      multiply_values(dp, y, at);
      this->take_extended(s, dp, keys.k_unit * q_unit(), keys.v_unit * dout_unit(), statistics, at);
      add_to_dv(s, y, dout_unit(), at);
      this->load_next(step + 1);
    } else {
      this->take_exponentials(s, keys.k_unit * q_unit() * scale, statistics, at);
      add_to_dv(s, y, dout_unit(), at);
      this->load_next(step + 1);
      multiply_values(dp, stage(step) + Config::kTileBytes, lane());
      this->find_gradients(dp, s, keys.v_unit * dout_unit(), statistics, at);
    }
    const uint32_t largest = largest_of(dp);
    if (at == 0) maxima[warp()] = largest;
    __syncthreads();  // the largest dS of all warps are there
    const int exponent = exponent_of(*reinterpret_cast<const uint4*>(maxima));
    Pairs ds;
    split_fragments(dp, ds, [&](int, int) { return Base::power_of_2(exponent); });
    store_ds(ds, at);
    const float unit = Base::power_of_2(-exponent);
    if (warp() == 0 && at == 0) keys.dq_unit = fminf(unit * keys.k_unit * scale, 0x1p127f);
    add_pairs(dx, ds, stage(step), fminf(unit * q_unit(), 0x1p127f), at);  // not infinity times 0
    cp_async_wait<0>();
    __syncthreads();  // dS and the next tile are there, and all are done with this one
    DqSums dq;
    multiply_keys(dq, at);
    add_to_dq(dq, keys.dq_unit, at);
  }

  SM80_DEVICE void run() {
    __shared__ Shared keys;
    if constexpr (Config::kExtended) __syncthreads();  // the first head is there
    if (tile.block_begin < tile.block_end) {
      this->load_own(shared + Config::kX, tile.x);
      this->load_own(shared + Config::kY, tile.y);
      this->load_next(0);
      if (threadIdx.x == 0) keys.k_unit = x_unit, keys.v_unit = y_unit;
      cp_async_wait<0>();
      __syncthreads();  // own rows, their units, the first tile and its successor's head are there
#pragma unroll 1
      while (head < tile.head_end) {
        process(keys);
        this->advance(head, block);
        ++step;
      }
    }
    this->store_gradients();
  }
};

}  // namespace flash_attn::cuda::sm80::fp32
