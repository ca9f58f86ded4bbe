// Backward for float32 in one kernel by two warpgroups that take turns in products. Each owns 64 keys, dK and dV of
// which are in its registers, and walks over tiles of query rows of all heads that read them; what its keys give to dQ
// it adds to global memory. Tiles of Q and dO come as in turns.h, two of each. A turn, for which P and dS of a tile are
// there:
//
//   dV += P dO     dK += dS Q     dQ^T = K^T dS     S = K Q^T and dP = V dO^T of the next tile
//
// dS goes through shared memory, because dQ sums it up over keys. All dS of a warpgroup have one power of two, which
// both products can bear: its four warps exchange their largest.
#pragma once

#include "../../sm80/fp32/backward/extended.h"
#include "../hopper/stmatrix.h"
#include "exponent.h"
#include "turns.h"

namespace flash_attn::cuda::sm90::fp32 {

/// Beside a tile of Q, and of dO, in its stage.
struct StageExtras {
  float q_unit, dout_unit;
  float* dq;  // of the sequence's first row
};

/// Base: a sm80::fp32::BackwardConfig of 8 warps that owns keys.
template <typename Base>
struct BackwardTurnsConfig : Base {
  static constexpr bool kNarrow = Base::kHeadDim == 64;
  using Order = Turns<2, kNarrow ? 40 : 24, /*kReleasingLanes=*/kNarrow ? 32 : 1>;
  static constexpr int kThreads = Order::kThreads;
  static constexpr int kExtras = Base::kStatistics + 2 * Base::kBlockN * 4;
  static constexpr int kDs = Base::kStreamed + Base::kStages * Base::kStageBytes;
  static constexpr int kDsBytes = 4 * Base::kBlockN * 64;  // of a warpgroup
  static constexpr int kSharedBytes = kDs + 2 * kDsBytes + Base::kSlack;
  static_assert(Base::kWithDx && Base::kWithDy && Base::kWarps == 8 && 2 * Base::kStages == kTurnSlots);
  static_assert(kExtras + int(sizeof(StageExtras)) <= Base::kStageBytes);
};

/// Loads of Q or of dO of every other tile, by one warp. `of_first`: of tile.head_begin.
template <typename Config>
SM80_DEVICE void produce_queries(const sm80::fp32::BackwardKernelParams& params, const sm80::fp32::BackwardTile& tile,
                                 const sm80::fp32::OtherHead& of_first, uint32_t shared, SlotBarriers& barriers) {
  constexpr int kColumns = 2 * Config::kHeadDim, kBlockN = Config::kBlockN;
  int head = tile.head_begin, block = tile.block_begin - 1;
  const auto advance = [&] {
    if (head < tile.head_end) sm80::fp32::advance<Config>(params, tile, head, block);
  };
  advance();
  if (threadIdx.x / 64 % 2 != 0) advance();
  for (uint32_t phase = 0; head < tile.head_end; phase ^= 1) {
    const int slot = sm80::fresh_thread(block) / 32 % 4;  // registers are few
    const bool of_dout = slot % 2 != 0;
    mbarrier_wait(&barriers.empty[slot], phase ^ 1);
    const int64_t ahead = head - tile.head_begin;
    const int first = block * kBlockN, lane = lane_id();
    const uint32_t stage = shared + Config::kStreamed + slot / 2 * Config::kStageBytes;
    const sm80::fp32::Planes& planes = of_dout ? params.dout : params.q;
    {
      const float* const statistics =
          (of_dout ? of_first.delta : of_first.lse) + ahead * params.problem.forward.total_q;
#pragma unroll
      for (int i = 0; i < kBlockN; i += 32) {
        sm80::fp32::load_statistic(stage + Config::kStatistics + (of_dout ? 4 * kBlockN : 0) + 4 * (i + lane),
                                   statistics, first + i + lane, tile.others);
      }
    }
    if (lane == 0) {
      const uint32_t extras = stage + Config::kExtras;
      const float* const units = (of_dout ? of_first.y.units : of_first.x.units) + ahead * planes.tiles;
      const float unit = __ldg(units + first / sm80::fp32::kTileRows);
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(extras + (of_dout ? 4 : 0)), "f"(unit) : "memory");
      const float* const dq = of_first.dq + ahead * params.problem.dq.head;
      if (!of_dout) asm volatile("st.shared.u64 [%0], %1;" ::"r"(extras + 8), "l"(dq) : "memory");
    }
    const __half* const rows = (of_dout ? of_first.y.data : of_first.x.data) + (ahead * planes.rows + first) * kColumns;
    const int begin = tile.other_begin - first, end = tile.other_end - first;
    sm80::fp32::load_rows<typename Config::OtherTile, kBlockN, Config::kLoaded, 32>(
        stage + (of_dout ? Config::kTileBytes : 0), rows, lane, begin <= 0 && end >= kBlockN,
        [=](int row) { return row >= begin && row < end; });
    Config::Order::publish(barriers, slot);
    advance();
    advance();
  }
}

template <typename Config>
struct BackwardTurnsBlock : sm80::fp32::BackwardScores<Config> {
  using Base = sm80::fp32::BackwardScores<Config>;
  using Base::tile, Base::p, Base::params, Base::shared, Base::step, Base::block, Base::head, Base::kNTiles,
      Base::kBlockM, Base::kBlockN, Base::x_unit, Base::y_unit, Base::dx, Base::dy, Base::lane, Base::warp;
  using typename Base::Pairs, typename Base::Scores;
  using Order = typename Config::Order;
  using Flat = FlatScores<kNTiles>;
  static constexpr int kPanels = Config::kHeadDim / 64;
  static constexpr bool kReduced = Config::Products::kReduced;
  static constexpr bool kKeepsDs = kPanels == 1;  // in registers for dK too, where there are enough
  using DqSums = Flat[kPanels];

  SlotBarriers& barriers;
  const int warpgroup;  // the same register in all lanes

  SM80_DEVICE BackwardTurnsBlock(const sm80::fp32::BackwardKernelParams& kernel_params,
                                 const sm80::fp32::BackwardTile& of_block, uint32_t shared_memory,
                                 SlotBarriers& of_slots, int number)
      : Base(kernel_params, of_block, shared_memory), barriers(of_slots), warpgroup(number) {}

  // -- tiles

  /// K and V of the warpgroup's keys.
  SM80_DEVICE void load_keys() const {
    constexpr int kColumns = 2 * Config::kHeadDim;
    const int first = 64 * warpgroup, rows = tile.own_rows - first;
    const auto load = [&](uint32_t to, const sm80::fp32::PlaneRows& from) {
      sm80::fp32::load_rows<typename Config::OwnTile, 64, Config::kLoaded, 128>(
          to + first * 128, from.data + int64_t{tile.own_begin + first} * kColumns, threadIdx.x % 128, rows >= 64,
          [rows](int row) { return row < rows; });
    };
    load(shared + Config::kX, tile.x);
    load(shared + Config::kY, tile.y);
    Order::publish_own(warpgroup);
  }

  SM80_DEVICE static int slot(int number, bool of_dout) { return number % Config::kStages * 2 + int{of_dout}; }
  SM80_DEVICE void wait_full(int number, bool of_dout) const {
    mbarrier_wait(&barriers.full[slot(number, of_dout)], number / Config::kStages % 2);
  }

  // -- dS

  SM80_DEVICE uint32_t own_ds() const { return shared + Config::kDs + warpgroup * Config::kDsBytes; }

  /// Rows become queries, columns the warpgroup's keys.
  SM80_DEVICE void store_ds(const Pairs& ds, int at) const {
    const int row = at / 16 * 8 + at % 8, chunk = warp() % 4 * 2 + at / 8 % 2;  // of the lane's matrix
    const uint32_t to = own_ds() + row * 128 + ((chunk ^ row) % 8 << 4);
#pragma unroll
    for (int k = 0; k < kNTiles / 2; ++k) {
      stmatrix_x4_transposed(to + k * 16 * 128, ds[k][0].high);
      if constexpr (!kReduced) stmatrix_x4_transposed(to + kBlockN * 128 + k * 16 * 128, ds[k][0].low);
    }
    async_proxy_fence();
    named_barrier_sync(Order::kOwn + warpgroup, 128);
  }

  // -- dQ

  SM80_DEVICE void start_dq(DqSums& sums) const {
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      issue_dq<kReduced, kBlockM, kPanels, kNTiles>(
          sums[panel], shared + Config::kX + panel * (kBlockM * 128) + warpgroup * (64 * 128), own_ds());
    }
    wgmma_commit();
  }

  /// `head_dq`: of the sequence's first row.
  SM80_DEVICE void finish_dq(DqSums& sums, float* head_dq, float unit, int at) const {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) wgmma_results(sums[panel]);
    const TensorView& view = params.problem.dq;
    const int first = block * kBlockN, column = warp() % 4 * 16 + at / 4;
    float* const to = head_dq + (first + at % 4 * 2) * view.row + column;
    if (tile.others - first >= kBlockN && p.head_dim == Config::kHeadDim) {
      float* row = to;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        float* const next = row + view.row;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          const float* const x = sums[panel] + 4 * n;
          add_to(row + 64 * panel, x[0] * unit);
          add_to(row + 64 * panel + 8, x[2] * unit);
          add_to(next + 64 * panel, x[1] * unit);
          add_to(next + 64 * panel + 8, x[3] * unit);
        }
        row += 8 * view.row;
      }
      return;
    }
    const int rows = tile.others - first - at % 4 * 2;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 8 * n + i % 2, across = 64 * panel + 8 * (i / 2);
          if (row < rows && column + across < p.head_dim)
            add_to(to + row * view.row + across, sums[panel][4 * n + i] * unit);
        }
  }

  SM80_DEVICE static void add_to(float* sum, float x) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(sum), "f"(x) : "memory");
  }

  // -- the loop over tiles

  /// Products of a tile's queries or rows of dO with own rows, over a half of the columns each.
  struct Halves {
    Flat first, second;
  };
  SM80_DEVICE void start_product(Halves& sums, int own, uint32_t other) const {
    wgmma_fence();
    start_rows<kReduced, Config::kHeadDim, kBlockM, kBlockN, kNTiles>(sums.first, sums.second,
                                                                      shared + own + warpgroup * (64 * 128), other);
  }
  SM80_DEVICE static void finish_product(Scores& s, Halves& sums) {
    wgmma_results(sums.first);
    wgmma_results(sums.second);
#pragma unroll
    for (int i = 0; i < 4 * kNTiles; ++i) flat(s)[i] = sums.first[i] + sums.second[i];
  }

  /// What a number of dV, dK and dQ is of a turn's sums, and where dQ of the sequence begins.
  struct Units {
    float dv, dk, dq;
    float* dq_rows;
  };

  /// From S and dP to P and dS in pairs, dS in shared memory as well.
  SM80_DEVICE Units prepare(Scores& s, Scores& dp, Pairs& probabilities, Pairs& ds, int at) {
    const uint32_t x = this->stage(step), statistics = x + Config::kStatistics;
    StageExtras extras;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(extras.q_unit), "=f"(extras.dout_unit)
                 : "r"(x + Config::kExtras));
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(extras.dq) : "r"(x + Config::kExtras + 8));
    if constexpr (Config::kExtended) {
      this->take_extended(s, dp, x_unit * extras.q_unit, y_unit * extras.dout_unit, statistics, at);
    } else {
      this->take_exponentials(s, x_unit * extras.q_unit * this->scale, statistics, at);
      this->find_gradients(dp, s, y_unit * extras.dout_unit, statistics, at);
    }
    split_fragments(s, probabilities, [](int, int) { return sm80::fp32::kPScale; });
    const int exponent = find_exponent<Config::kWarps>(*this, dp[0], [this] { return warpgroup; }, Order::kOwn);
    split_fragments(dp, ds, [&](int, int) { return Base::power_of_2(exponent); });
    store_ds(ds, at);
    const float unit = Base::power_of_2(-exponent);
    return {extras.dout_unit / sm80::fp32::kPScale, fminf(unit * extras.q_unit, 0x1p127f),  // not infinity times 0
            fminf(unit * x_unit * this->scale, 0x1p127f), extras.dq};
  }

  /// On exit S and dP are those of the next tile. Behind the last one they are of whatever is there: a form of its own
  /// would be more code and take more registers.
  SM80_DEVICE void take_turn(Scores& s, Scores& dp, const Pairs& probabilities, const Pairs& ds, const Units& units,
                             bool next, int at) {
    const uint32_t x = this->stage(step), y = x + Config::kTileBytes;
    const auto dv_unit = [=](int, int) { return units.dv; };
    const auto dk_unit = [=](int, int) { return units.dk; };
    Order::begin(warpgroup);
    const auto start_dv = [&](float (&sum)[32], int panel) {
      wgmma_fence();
      start_columns<kReduced, Config::kHeadDim>(sum, probabilities, y, 64 * panel);
    };
    const auto start_dk = [&](float (&sum)[32], int panel) {
      wgmma_fence();
      if constexpr (kKeepsDs) {
        start_columns<kReduced, Config::kHeadDim>(sum, ds, x, 64 * panel);
      } else {
        issue_dk<kReduced, kPanels, kNTiles>(sum, own_ds(), x + panel * (kBlockN * 128));
        wgmma_commit();
      }
    };
    // Of two groups of registers one is read out while products go to the other.
    union Group {
      float panel[32];
      DqSums dq;
      Halves halves;
      SM80_DEVICE Group() {}
    };
    Group one, two;
    start_dv(one.panel, 0);
    if constexpr (kPanels == 2) {
      start_dv(two.panel, 1);
      wgmma_wait<1>();
      finish_columns(dy, one.panel, 0, dv_unit);
      start_dk(one.panel, 0);
      wgmma_wait<1>();
      release(step, true);
      finish_columns(dy, two.panel, 64, dv_unit);
      start_dk(two.panel, 1);
      wgmma_wait<1>();
      finish_columns(dx, one.panel, 0, dk_unit);
    } else {
      start_dk(two.panel, 0);
      wgmma_wait<1>();
      release(step, true);
      finish_columns(dy, one.panel, 0, dv_unit);
    }
    wgmma_discard(one.panel);
    start_dq(one.dq);
    wgmma_wait<1>();
    release(step, false);
    finish_columns(dx, two.panel, 64 * (kPanels - 1), dk_unit);
    if (next) wait_full(step + 1, false);
    wgmma_discard(two.panel);
    start_product(two.halves, Config::kX, this->stage(step + 1));
    wgmma_wait<1>();
    finish_dq(one.dq, units.dq_rows, units.dq, at);
    if (next) wait_full(step + 1, true);
    wgmma_discard(one.panel);
    start_product(one.halves, Config::kY, this->stage(step + 1) + Config::kTileBytes);
    Order::end(warpgroup);
    wgmma_wait<0>();
    finish_product(s, two.halves);
    finish_product(dp, one.halves);
  }
  SM80_DEVICE void release(int number, bool of_dout) const { Order::release(barriers, slot(number, of_dout)); }

  SM80_DEVICE void run() {
    if (tile.block_begin < tile.block_end) {
      load_keys();
      Order::open(warpgroup);
      --block;
      this->advance(head, block);
    } else {
      head = tile.head_end;
    }
    if (head < tile.head_end) {
      Scores s, dp;
      {
        Halves of_s, of_dp;
        wait_full(0, false);
        wait_full(0, true);
        Order::begin(warpgroup);
        start_product(of_s, Config::kX, this->stage(0));
        start_product(of_dp, Config::kY, this->stage(0) + Config::kTileBytes);
        Order::end(warpgroup);
        wgmma_wait<0>();
        finish_product(s, of_s);
        finish_product(dp, of_dp);
      }
#pragma unroll 1
      for (bool next = true; next; ++step) {
        int next_head = head, next_block = block;
        this->advance(next_head, next_block);
        next = next_head < tile.head_end;
        const int at = lane();
        Pairs probabilities, ds;
        const Units units = prepare(s, dp, probabilities, ds, at);
        take_turn(s, dp, probabilities, ds, units, next, at);
        head = next_head, block = next_block;
      }
    }
    this->store_gradients();
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_turns_kernel(const __grid_constant__ sm80::fp32::BackwardKernelParams params) {
  using Order = typename Config::Order;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ sm80::fp32::BackwardTile shared_tile;
  __shared__ sm80::fp32::OtherHead first_head;
  __shared__ SlotBarriers barriers;
  {
    sm80::fp32::BackwardTile tile;
    if (!sm80::fp32::find_tile<Config>(params, tile)) return;
    if (threadIdx.x == 0) {
      shared_tile = tile;
      first_head = sm80::fp32::find_other_head<true>(params, tile, tile.head_begin);
      Order::init(barriers);
    }
  }
  __syncthreads();  // the tile and the barriers are there
  const int warpgroup = int(uniform(threadIdx.x / 128));
  const uint32_t begin = (shared_address(shared) + 1023) & ~1023u;
  if (warpgroup == Order::kConsumers) {
    register_budget_lower<Order::kProducerRegisters>();
    if (shared_tile.block_begin < shared_tile.block_end) {
      produce_queries<Config>(params, shared_tile, first_head, begin, barriers);
    }
  } else {
    register_budget_raise<Order::kConsumerRegisters>();
    BackwardTurnsBlock<Config>(params, shared_tile, begin, barriers, warpgroup).run();
  }
}

}  // namespace flash_attn::cuda::sm90::fp32
