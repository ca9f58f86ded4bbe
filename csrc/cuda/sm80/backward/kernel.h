// Backward (Dao 2023, arXiv:2307.08691, algorithm 2), see config.h for who has what. For each block of query rows, of
// each query head that reads the block's keys:
//
//   wait for Q, dO           S^T = K Q^T   dP^T = V dO^T - delta       the next block's place for Q, dO is free
//                            P = exp(S - lse)   dS = P dP              to shared memory
//                            dV += P^T dO   dK += dS^T Q               own query rows, from registers; the next block
//                                                                      is loaded among these products
//   wait for all warps' dS   dV += P^T dO   dK += dS^T Q               the others'
//                            dQ = dS K                                 added to dq_accum in global memory
//
// No barrier stops all warps at once: each arrives where it has written or read, and waits where it needs what others
// have, with products in between.
#pragma once

#include <type_traits>

#include "../../common/dependent_launch.h"
#include "bias.h"
#include "epilogue.h"
#include "schedule/turns.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
struct BackwardBlock : BackwardEpilogue<Config> {
  using Base = BackwardEpilogue<Config>;
  using Base::kQ, Base::kDo, Base::full, Base::empty, Base::phase, Base::scores_written, Base::scores_read;
  using Base::lane, Base::warp, Base::add_slope_sum, Base::slope_sum, Base::store_slope_sum, Base::warp_key,
      Base::warp_q, Base::advance, Base::accum_block;
  using Base::params, Base::p, Base::tile, Base::shared, Base::head, Base::m_block, Base::step;
  using typename Base::Side;
  using Element = typename Config::Element;
  using Tile = SharedTile<Config::kHeadDim>;
  using ScoreTile = SharedTile<Config::kBlockM>;  // (keys, queries)
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kStages = Config::kStages;
  static constexpr int kKeyTiles = Config::kKeyTiles, kQueryTiles = Config::kQueryTiles;
  static constexpr int kQuerySteps = Config::kWarpQueries / 16;

  const std::conditional_t<Config::kBias, BiasRules<Config>, GradientRules<Config>> rules;
  float dk[kKeyTiles][Config::kColumnTiles][4], dv[kKeyTiles][Config::kColumnTiles][4];
  uint32_t p_t[kQuerySteps][kKeyTiles][4], ds_t[kQuerySteps][kKeyTiles][4];  // P^T, dS^T as A fragments

  SM80_DEVICE BackwardBlock(const BackwardKernelParams& kernel_params, const BackwardTile& t, uint32_t shared_memory)
      : Base(kernel_params, t, shared_memory), rules(kernel_params, t) {
    clear(dk);
    clear(dv);
  }

  // -- products

  SM80_DEVICE WarpPlace warp_place() const {
    return {m_block * kBlockM + warp_q() * Config::kWarpQueries, warp_key(), uint32_t(lane())};
  }

  /// Instead of compute_scores() where no query of the warp sees a key of it.
  SM80_DEVICE void clear_scores(int stage) {
    if constexpr (!Config::kTogether) barrier_wait(full(kDo, stage), phase());
    barrier_wait(full(kQ, stage), phase());
#pragma unroll
    for (int k = 0; k < kQuerySteps; ++k)
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) p_t[k][m][i] = ds_t[k][m][i] = 0;
  }

  SM80_DEVICE void compute_scores(int stage) {
    const WarpPlace place = warp_place();
    const int key = place.key, query = place.row - m_block * kBlockM, at = int(place.lane);
    [[maybe_unused]] typename GradientRules<Config>::Bits shown;
    [[maybe_unused]] typename GradientRules<Config>::Kept kept;
    [[maybe_unused]] typename GradientRules<Config>::MaskWords words;
    if constexpr (Config::kExtended) rules.find_shown(shown, head, place);
    if constexpr (Config::kRules == Rules::kMask) rules.load_words(words, head, place);
    if constexpr (Config::kBias) {
      if (step > 0) barrier_wait(this->p_read(), uint32_t(step - 1) & 1);
      rules.load(shared + Config::kP, warp_q(), head, place);
    }
    if constexpr (Config::kExtended) rules.draw_kept(kept, head, place);
    float s[kKeyTiles][kQueryTiles][4], dp[kKeyTiles][kQueryTiles][4];
    const auto multiply_s = [&] {
      barrier_wait(full(kQ, stage), phase());
      multiply_rows<Element, Config::kHeadDim>(
          s, address_by_rows<Tile>(shared + Config::kK, key, at),
          address_by_columns<Tile>(shared + Config::kQ + stage * Config::kQueryBytes, query, at),
          [](int) { return float2{0.f, 0.f}; });
    };
    const auto multiply_dp = [&] {
      if constexpr (!Config::kTogether) barrier_wait(full(kDo, stage), phase());
      const uint32_t minus_delta = shared + Config::kDelta + stage * Config::kStatisticBytes + 4 * query;
      multiply_rows<Element, Config::kHeadDim>(
          dp, address_by_rows<Tile>(shared + Config::kV, key, at),
          address_by_columns<Tile>(shared + Config::kDo + stage * Config::kQueryBytes, query, at),
          [&](int n) { return rules.start(minus_delta, n, uint32_t(at)); });
    };
    const auto draw_beside = [&] {  // these products
      if constexpr (Config::kRules == Rules::kDropout) rules.draw_kept(kept, head, place);
    };
    if constexpr (kStages > 1) {
      multiply_s();
      if constexpr (Config::kEarlyTurns) end_last_turn();
      draw_beside();
      multiply_dp();
    } else {  // dO is loaded first
      multiply_dp();
      if constexpr (Config::kEarlyTurns) end_last_turn();
      draw_beside();
      multiply_s();
    }
    if constexpr (Config::kRules == Rules::kDropout) kept.exchange(int(at));
    const uint32_t statistics = shared + stage * Config::kStatisticBytes + 4 * query;
    if constexpr (Config::kExtended) {
      add_slope_sum(rules.apply_extended(s, dp, statistics + Config::kLse, statistics + Config::kDelta, head, place,
                                         shown, kept, p_t, ds_t, [](int, int, int, float) {}));
    } else if constexpr (Config::kBias) {
      rules.apply(s, dp, statistics + Config::kLse, shared + Config::kP, warp_q(), head, place, p_t, ds_t);
    } else {
      if constexpr (Config::kMasks) rules.find_shown(shown, words, place);
      rules.apply(s, dp, statistics + Config::kLse, statistics + Config::kDelta, place, shown, kept, p_t, ds_t);
    }
  }

  SM80_DEVICE void store_scores() const {
    const int key = warp_key(), first_step = warp_q() * kQuerySteps, at = lane();
#pragma unroll
    for (int k = 0; k < kQuerySteps; ++k) {
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) {
        if constexpr (Config::kWarpsQ > 1) {
          store_fragment<ScoreTile>(shared + Config::kP, key + 16 * m, first_step + k, at, p_t[k][m]);
        }
        store_fragment<ScoreTile>(shared + Config::kDs, key + 16 * m, first_step + k, at, ds_t[k][m]);
      }
    }
  }

  /// This warp's columns of 16 rows of Q or dO.
  SM80_DEVICE uint32_t query_rows(uint32_t tiles, int stage, int row) const {
    const int at = lane();
    return shared + tiles + stage * Config::kQueryBytes + Tile::offset(row + at % 16, 2 * warp_q() + at / 16);
  }

  /// dV += P^T dO or dK += dS^T Q; `beside(k)` after each sixteen queries.
  template <typename Accumulators, typename Fragments, typename Beside>
  SM80_DEVICE void add_own_queries(Accumulators& acc, const Fragments& a, uint32_t tiles, int stage,
                                   const Beside& beside) const {
    const uint32_t b = query_rows(tiles, stage, warp_q() * Config::kWarpQueries);
#pragma unroll
    for (int k = 0; k < kQuerySteps; ++k) {
      multiply_step<Element, Config::kHeadDim, Config::kWarpsQ>(acc, a[k], b + k * 16 * Tile::kRowBytes);
      beside(k);
    }
  }

  template <typename Accumulators>
  SM80_DEVICE void add_other_queries(Accumulators& acc, uint32_t scores, uint32_t tiles, int stage) const {
#pragma unroll
    for (int other = 1; other < Config::kWarpsQ; ++other) {
      const int share = (warp_q() + other) % Config::kWarpsQ;
      const uint32_t a = address_by_rows<ScoreTile>(shared + scores, warp_key(), lane());
      const uint32_t b = query_rows(tiles, stage, share * Config::kWarpQueries);
#pragma unroll
      for (int k = 0; k < kQuerySteps; ++k) {
        uint32_t x[kKeyTiles][4];
#pragma unroll
        for (int m = 0; m < kKeyTiles; ++m) {
          ldmatrix_x4(x[m], ScoreTile::along(a, share * kQuerySteps + k) + m * 16 * ScoreTile::kRowBytes);
        }
        multiply_step<Element, Config::kHeadDim, Config::kWarpsQ>(acc, x, b + k * 16 * Tile::kRowBytes);
      }
    }
  }

  using DqAccumulators = float[Config::kDqRowTiles][Config::kDqColumnTiles][4];

  SM80_DEVICE void multiply_dq(DqAccumulators& dq, int pass) const {
    const int at = lane(), dq_warp = warp(), dq_m = dq_warp / Config::kDqWarpsD, dq_d = dq_warp % Config::kDqWarpsD;
    const uint32_t ds =
        ScoreTile::along(address_by_columns<ScoreTile>(shared + Config::kDs, 0, at), dq_m * Config::kDqRowTiles);
    const uint32_t keys = Tile::along(shared + Config::kK + Tile::offset(at % 16, 2 * dq_d + at / 16),
                                      pass * Config::kDqColumnTiles / 2 * Config::kDqWarpsD);
    clear(dq);
    const auto add_keys = [&](int k, const auto& change) {
      uint32_t x[Config::kDqRowTiles][4];
#pragma unroll
      for (int m = 0; m < Config::kDqRowTiles; ++m) {
        ldmatrix_x4_trans(x[m], ScoreTile::along(ds, m) + k * 16 * ScoreTile::kRowBytes);
      }
      multiply_step<Element, Config::kHeadDim, Config::kDqWarpsD>(dq, x, keys + k * 16 * Tile::kRowBytes, change);
    };
    // Keys that no query of the block sees are left out: by sixteen, and the others of those as zeros, for they may
    // hold NaN, and 0 times that is NaN.
    const int first = max(0, max(m_block * kBlockM, tile.row_begin) + tile.low);
    const int last = min(tile.keys, min((m_block + 1) * kBlockM, tile.row_end) + tile.high);
    if (first == 0 && last == tile.keys && last > kBlockN - 16) {
#pragma unroll
      for (int k = 0; k < kBlockN / 16; ++k) add_keys(k, [](uint32_t (&)[4]) {});
    } else {
#pragma unroll 1
      for (int k = first / 16; 16 * k < last; ++k) {
        const auto seen = [&](int key) {
          return (key >= first && key < last ? 0xffffu : 0u) | (key + 1 >= first && key + 1 < last ? 0xffff0000u : 0u);
        };
        const uint32_t upper = seen(16 * k + at % 4 * 2), lower = seen(16 * k + 8 + at % 4 * 2);
        add_keys(k, [=](uint32_t (&y)[4]) { y[0] &= upper, y[2] &= upper, y[1] &= lower, y[3] &= lower; });
      }
    }
  }

  /// Asks before the products of dQ how many have added to its rows: the answer takes as long as they do.
  SM80_DEVICE int ask_turn() const {
    if (!Config::kSpareRegister || params.turns == nullptr || lane() != 0) return 0;
    return count_turns(params.turns + accum_block(head, m_block) * Config::kWarps + warp());
  }

  SM80_DEVICE void add_dq(const DqAccumulators& dq, int pass, int turns) const {
    const int at = lane(), dq_warp = warp(), dq_m = dq_warp / Config::kDqWarpsD, dq_d = dq_warp % Config::kDqWarpsD;
    const int64_t block = accum_block(head, m_block);
    if (params.turns != nullptr && pass == 0) {
      await_turn(params.turns + block * Config::kWarps + dq_warp, turn_of(params, tile, m_block), turns);
    }
    const int first = dq_m * Config::kDqRowTiles * (Config::kHeadDim / 8) + 2 * dq_d;
    float* const to = params.dq_accum + block * (kBlockM * Config::kHeadDim) + first * 128 + dq_place(at, 0);
#pragma unroll
    for (int m = 0; m < Config::kDqRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Config::kDqColumnTiles; ++n) {
        const int pair = pass * Config::kDqColumnTiles / 2 + n / 2;
        add_fragment(to + (m * (Config::kHeadDim / 8) + 2 * pair * Config::kDqWarpsD + n % 2) * 128, dq[m][n]);
      }
    }
    if (params.turns != nullptr && pass == 0 && at == 0) added_turn() = params.turns + block * Config::kWarps + dq_warp;
  }

  /// The counter of what this warp has added last, in shared memory.
  SM80_DEVICE int*& added_turn() const {
    return static_cast<int**>(__cvta_shared_to_generic(shared + Config::kAddedTurns))[warp()];
  }

  /// Says that it is there: not before the next step's scores, or the first half of them, by when it is, and saying so
  /// takes no time.
  SM80_DEVICE void end_last_turn() const {
    if (params.turns != nullptr && step > 0) end_turn(added_turn());
  }

  // -- the loop over blocks of query rows

  /// Returns the next step, where its copies are spread.
  SM80_DEVICE typename Base::NextCopies process_block() {
    const int stage = step % kStages;
    if constexpr (Config::kMasks) {
      if (p.mask.data != nullptr) this->clear_blind_queries(stage);
    }
    const bool blind = rules.is_blind(warp_place());
    if (blind) {
      clear_scores(stage);
    } else {
      compute_scores(stage);
    }
    if (!Config::kEarlyTurns || blind) end_last_turn();
    [[maybe_unused]] typename Base::NextCopies next{};
    const auto copy_beside = [&](Side side) {
      return [&, side](int k) {
        if constexpr (Config::kSpreadsCopies) this->copy_share(next, side, k, kQuerySteps);
      };
    };
    if constexpr (Config::kSpreadsCopies) {
      next = this->begin_next();
    } else if constexpr (kStages > 1) {
      this->template load_next<kDo, kQ>();
    }
    if (step > 0) barrier_wait(scores_read(), uint32_t(step - 1) & 1);
    store_scores();
    barrier_arrive_warp(scores_written());
    if constexpr (Config::kSpreadsCopies) this->find_pieces(next);
    if (!(Config::kFewRegisters || Config::kBias ? rules.is_blind(warp_place()) : blind)) {
      add_own_queries(dv, p_t, Config::kDo, stage, copy_beside(kDo));
      add_own_queries(dk, ds_t, Config::kQ, stage, copy_beside(kQ));
    } else {
#pragma unroll
      for (int k = 0; k < kQuerySteps; ++k) copy_beside(kDo)(k), copy_beside(kQ)(k);
    }
    if constexpr (Config::kSpreadsCopies) this->end_next(next);
    barrier_wait(scores_written(), uint32_t(step) & 1);
    add_other_queries(dv, Config::kP, Config::kDo, stage);
    if constexpr (Config::kBias) barrier_arrive_warp(this->p_read());
    if constexpr (!Config::kTogether) this->arrive_read(empty(kDo, stage));
    add_other_queries(dk, Config::kDs, Config::kQ, stage);
    this->arrive_read(empty(kQ, stage));
    if constexpr (kStages == 1) this->template load_next<kDo>();
    const int turns = ask_turn();
    DqAccumulators dq;
#pragma unroll
    for (int pass = 0; pass < Config::kDqPasses; ++pass) {
      multiply_dq(dq, pass);
      if (pass == Config::kDqPasses - 1) barrier_arrive_warp(scores_read());
      if constexpr (kStages == 1) {
        if (pass == 0) this->template load_next<kQ>();
      }
      if (params.problem.dq.data != nullptr) add_dq(dq, pass, turns);
    }
    return next;
  }

  SM80_DEVICE void run() {
    this->init_barriers();
    if constexpr (Config::kExtended) {
      for (int h = tile.head_begin; h < tile.head_end; ++h) store_slope_sum(h, 0.f);  // some have no step
    }
    bool more = tile.num_m_blocks > 0;
    if (Config::kMasks && more && is_hidden<Config>(params, tile, head, m_block)) more = advance(head, m_block);
    if (more) this->load_keys();  // arrive with the first dO
    grid_dependency_wait();       // for what the kernel before prepares of query rows
    if (more) {
      const auto first = this->query_block(head, m_block);
      this->load_queries(kDo, first, 0);
      if constexpr (!Config::kTogether) this->arrive_loaded(kDo, 0);
      this->load_queries(kQ, first, 0);
      this->arrive_loaded(kQ, 0);
    }
#pragma unroll 1
    while (more) {
      [[maybe_unused]] const auto next = process_block();
      int next_head = head, next_block = m_block;
      if constexpr (Config::kSpreadsCopies && Config::kRules == Rules::kMask) {
        more = next.any, next_head = next.head, next_block = next.block;
      } else {
        more = advance(next_head, next_block);
      }
      if constexpr (Config::kExtended) {
        if (next_head != head) store_slope_sum(head, slope_sum());
      }
      head = next_head;
      m_block = next_block;
      ++step;
    }
    end_last_turn();
    if (params.parts > 1) {
      this->store_part(params.dk_parts, dk, float(p.softmax_scale));
      this->store_part(params.dv_parts, dv, this->dv_scale());
      return;
    }
    __syncthreads();  // all warps are done with K and V
    this->stage_gradient(Config::kK, dk, float(p.softmax_scale));
    this->stage_gradient(Config::kV, dv, this->dv_scale());
    __syncthreads();  // dK and dV are in their places
    this->store_gradient(Config::kK, params.problem.dk, p.head_dim);
    this->store_gradient(Config::kV, params.problem.dv, p.head_dim_v);
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    backward_kernel(const __grid_constant__ BackwardKernelParams params) {
  if constexpr (Config::kHasCode) {
    extern __shared__ __align__(128) unsigned char dynamic[];
    static_assert(sizeof(BackwardTile) <= Config::kTileBytes);
    uint32_t shared = shared_address(dynamic);
    asm volatile("" : "+r"(shared));  // one register, rather than its computation wherever it is used
    // In shared memory: registers are for accumulators.
    BackwardTile& tile = *static_cast<BackwardTile*>(__cvta_shared_to_generic(shared + Config::kTile));
    grid_launch_dependents();
    {
      BackwardTile found;
      if (!find_tile<Config>(params, found)) {
        grid_dependency_wait();  // that this kernel has ended says that the one before has
        return;
      }
      if (threadIdx.x == 0) tile = found;
      __syncthreads();  // all see the tile
    }
    BackwardBlock<Config>(params, tile, shared).run();
  } else {
    __trap();
  }
}

}  // namespace flash_attn::cuda::sm80
