// Backward pass for head dimensions up to 256, where dK and dV of 64 key rows fill the registers of a warpgroup each:
// two CTAs, a cluster, share a tile of 128 key rows, and the warpgroups have different parts. See single/kernel.h for
// the formulas.
//
//   scores      S^T = K Q^T, P (to the other through shared memory), dV += P^T dO
//   gradients   dP^T = V dO^T, dS (copied to the peer CTA), dK += dS^T Q
//   both        dQ of the step before: 64 of this CTA's half of the columns, over the key rows of both CTAs
//   producer    one thread, TMA; two more see to the order in which tiles bring their dQ (dq/turns.h), one to
//               the rows that the tile prepares (preprocess/prepared_rows.h)
//
// So dQ leaves the pair once, and each CTA keeps only half of the peer's K.
#pragma once

#include <cstddef>

#include "../../../common/dependent_launch.h"
#include "../../hopper/cluster.h"
#include "consumer.h"
#include "producer.h"

namespace flash_attn::cuda::sm90::backward::pair {

template <typename Config>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(Config::kThreads, 1)
    backward_pair_kernel(const __grid_constant__ KernelParams params) {
  if constexpr (Config::kBand) {
    if (params.condition.excludes()) return;
  }
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<SharedStorage<Config>*>(shared_bytes);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
  // Clusters start in the order of their tiles, so the tiles that this one waits for have started.
  const int rank = cluster_rank(), lane = threadIdx.x % 32, index = blockIdx.x / 2;
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.k_full, 1);
    mbarrier_init(&shared.v_full, 1);
    mbarrier_init(&shared.dout_full, 1);
    mbarrier_init(&shared.dout_empty, 2);
    init_turns(shared.dq_turns, 128 * min(2, Config::kPanels - 2 * rank));
    mbarrier_init(&shared.prepared_full, 1);
    mbarrier_init(&shared.prepared_empty, 256);
    mbarrier_init(&shared.share_chosen, 1);
    mbarrier_init(&shared.all_prepared, 1);
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&shared.q_full[i], 1);
      mbarrier_init(&shared.q_empty[i], 2);
      mbarrier_init(&shared.p_full[i], 128);
      mbarrier_init(&shared.p_empty[i], 128);
      mbarrier_init(&shared.ds_full[i], 1);
      mbarrier_init(&shared.ds_peer_full[i], 1);
      mbarrier_init(&shared.ds_free[i], 3);
    }
    mbarrier_init_fence();
    for (int i = 0; i < 2; ++i) mbarrier_arrive_expect(&shared.ds_peer_full[i], Config::kPanelBytes);
  }
  if (threadIdx.x == 32) {
    if (params.schedule.packed_blocks != nullptr) grid_dependency_wait();  // for them
    if (!make_tile<Config>(params, index, shared.tile)) shared.tile.num_heads = 0;
    if (params.preparation.enabled()) shared.tile.awaited_blocks = count_awaited<Config>(params, shared.tile);
  }
  shared.weights.template init<typename Config::Element>();
  __syncthreads();
  cluster_sync();                          // before any signal from the peer
  grid_dependency_wait();                  // for what was prepared or cleared
  if (shared.tile.num_heads == 0) return;  // in both CTAs
  if (params.panels < Config::kPanels || params.panels_v < Config::kPanelsV || !has_rows(shared.tile, 1)) {
    using Storage = SharedStorage<Config>;
    clear_shared<Config::kThreads>(shared.k,
                                   offsetof(Storage, ds) - offsetof(Storage, k));  // boxes that are not loaded
    __syncthreads();
  }
  if (warpgroup == 2) {
    register_budget_lower<Config::kProducerRegisters>();
    if (lane == 0) {
      uint32_t step = 0;
      switch (warp) {
        case 0: Producer<Config>{params, shared, rank}.run(); break;
        // Neither has to wait for the other's messages to L2.
        case 1: follow_turns<TurnPart::kBegin, Config>(params, shared.tile, shared.dq_turns, step, rank); break;
        case 2: follow_turns<TurnPart::kEnd, Config>(params, shared.tile, shared.dq_turns, step, rank); break;
        case 3: Preparer<Config>{params, shared, rank}.run(); break;
      }
    }
  } else {
    register_budget_raise<Config::kConsumerRegisters>();
    if (warpgroup == 0) {
      Consumer<Config, Role::kScores>{params, shared, rank, warp, lane}.run();
    } else {
      Consumer<Config, Role::kGradients>{params, shared, rank, warp, lane}.run();
    }
  }
  __syncthreads();
  cluster_sync();  // the peer may still read from, or signal, this CTA
}

}  // namespace flash_attn::cuda::sm90::backward::pair
