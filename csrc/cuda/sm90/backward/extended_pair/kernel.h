// Backward pass beyond head dimension 128 where a score is more than scale * q.k, or attn_mask hides some:
// pair/kernel.h with the rules of extended/.
//
//   scores      S^T, all rules: P, and what the other multiplies by (consumer.h); dV
//   gradients   dP^T, dS, dK; the sum for ALiBi's slopes, attn_mask's gradient
//   both        dQ of the step before
//   producer    one thread; two more see to the order in which tiles bring their dQ, if it is fixed, or one to that and
//               one to that of attn_mask's gradient (extended/dmask.h); a warp lists the query blocks that the tile
//               visits (extended/steps.h), in each CTA the same ones
//
// As in extended/ dq_accum is 0 at first, and another launch prepares all rows.
#pragma once

#include <cstddef>

#include "../../../common/dependent_launch.h"
#include "../../hopper/cluster.h"
#include "consumer.h"
#include "producer.h"

namespace flash_attn::cuda::sm90::backward::extended_pair {

template <typename Config>
FLASH_ATTN_DEVICE void init_barriers(const KernelParams& params, pair::SharedStorage<Config>& shared, int rank) {
  mbarrier_init(&shared.k_full, 1);
  mbarrier_init(&shared.v_full, 1);
  mbarrier_init(&shared.dout_full, 1);
  mbarrier_init(&shared.dout_empty, 2);
  mbarrier_init(&shared.p_full, 128);
  mbarrier_init(&shared.p_empty, 128);
  mbarrier_init(&shared.bias_full, 1);
  mbarrier_init(&shared.bias_empty, 4);
  init_turns(shared.dq_turns, 128 * min(2, Config::kPanels - 2 * rank));
  if constexpr (Config::kStoresDmask) init_turns(shared.dmask_turns[0], 128);
  for (int i = 0; i < 2; ++i) {
    mbarrier_init(&shared.q_full[i], 1);
    mbarrier_init(&shared.q_empty[i], 2);
    mbarrier_init(&shared.ds_full[i], 1);
    mbarrier_init(&shared.ds_peer_full[i], 1);
    mbarrier_init(&shared.ds_free[i], 3);
    mbarrier_init(&shared.steps_full[i], 32);  // lanes that list
    mbarrier_init(&shared.steps_empty[i], num_step_readers<Config>(params));
  }
  static_assert(extended::kChunks == 2, "as many as stages");
  mbarrier_init_fence();
  for (int i = 0; i < 2; ++i) mbarrier_arrive_expect(&shared.ds_peer_full[i], Config::kPanelBytes);
  shared.list.chunk = 0;
}

/// By a thread, in a fixed order: tells consumers when it is their turn, or the next tile, or both.
template <TurnPart kPart, typename Config>
FLASH_ATTN_DEVICE void follow_dq(const KernelParams& params, pair::SharedStorage<Config>& shared, int rank) {
  uint32_t number = 0;
  extended::StepReader{}.for_each<false>(shared, [&](const extended::Step& step) {
    BlockCounters& block = params.dq_counters[extended::block_of_step(params, shared.tile, step)];
    if constexpr (kPart != TurnPart::kEnd) {
      wait_for_count(turn_count(params, block, rank), step.before);
      say_turn(shared.dq_turns, number, false);
    }
    if constexpr (kPart != TurnPart::kBegin) end_turn(params, block, shared.dq_turns, number, rank);
    ++number;
  });
}

/// By a thread: the same of attn_mask's gradient.
template <typename Config>
FLASH_ATTN_DEVICE void follow_dmask(const KernelParams& params, pair::SharedStorage<Config>& shared, int rank) {
  uint32_t number = 0;
  extended::StepReader{}.for_each<false>(shared, [&](const extended::Step& step) {
    extended::follow_dmask_step<Config>(params, shared.dmask_turns[0], shared.tile, step, number, rank);
    ++number;
  });
}

template <typename Config>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(Config::kThreads, 1)
    backward_kernel(const __grid_constant__ KernelParams params) {
  if (params.condition.excludes()) return;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  using Storage = pair::SharedStorage<Config>;
  auto& shared = *reinterpret_cast<Storage*>(shared_bytes);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
  // Clusters start in the order of their tiles, so the tiles that this one waits for have started.
  const int rank = cluster_rank(), lane = threadIdx.x % 32, place = blockIdx.x / 2;
  const int index = Config::kStoresDmask ? extended::tile_in_order(params, place) : place;
  if (threadIdx.x == 0) init_barriers(params, shared, rank);
  grid_dependency_wait();  // for what was prepared, zeroed or cleared
  if (threadIdx.x == 32 && !make_tile<Config>(params, index, shared.tile)) shared.tile.num_heads = 0;
  if (const ForwardParams& problem = params.problem; threadIdx.x == 64 && problem.dropout_p > 0.0) {
    shared.dropout = make_dropout(problem.rng_state, problem.dropout_p);
  }
  __syncthreads();
  cluster_sync();                          // before any signal from the peer
  if (shared.tile.num_heads == 0) return;  // in both CTAs
  if (params.panels < Config::kPanels || params.panels_v < Config::kPanelsV || !pair::has_rows(shared.tile, 1)) {
    clear_shared<Config::kThreads>(shared.k,
                                   offsetof(Storage, ds) - offsetof(Storage, k));  // boxes that are not loaded
    __syncthreads();
  }
  if (warpgroup == 2) {
    register_budget_lower<Config::kProducerRegisters>();
    if (warp == 3) {
      extended::StepLister<Config, Storage>{params, shared}.list(shared.tile);
    } else if (lane == 0 && warp == 0) {
      Producer<Config>{{params, shared, rank}}.run();
    } else if constexpr (Config::kStoresDmask) {
      if (lane == 0 && warp == 1 && params.is_ordered()) follow_dq<TurnPart::kBoth, Config>(params, shared, rank);
      if (lane == 0 && warp == 2 && params.extended.dmask_counters != nullptr) follow_dmask(params, shared, rank);
    } else if (lane == 0 && params.is_ordered()) {  // neither has to wait for the other's messages to L2
      warp == 1 ? follow_dq<TurnPart::kBegin, Config>(params, shared, rank)
                : follow_dq<TurnPart::kEnd, Config>(params, shared, rank);
    }
  } else {
    register_budget_raise<Config::kConsumerRegisters>();
    if (warpgroup == 0) {
      Consumer<Config, Role::kScores>{{params, shared, rank, warp, lane}, {shared}}.run();
    } else {
      Consumer<Config, Role::kGradients>{{params, shared, rank, warp, lane}, {shared}}.run();
    }
  }
  __syncthreads();
  cluster_sync();  // the peer may still read from, or signal, this CTA
}

}  // namespace flash_attn::cuda::sm90::backward::extended_pair
