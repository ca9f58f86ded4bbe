// Backward pass: dq, dk, dv from dout (Dao et al., "FlashAttention", 2022, section 3.1 and algorithm 4;
// "FlashAttention-2", 2023, algorithm 2), for head dimensions up to 128.
//
// A CTA owns 128 rows of K and V and streams blocks of Q and dO past them. S, dP are computed transposed, so that P and
// dS, packed, are operands from registers for dV and dK, which stay in registers for the whole tile:
//
//   S^T = K Q^T    P^T = exp(S^T - lse)      dV += P^T dO
//   dP^T = V dO^T  dS^T = P^T (dP^T - delta)  dK += dS^T Q      dQ += dS K, over all CTAs, in fp32 in global memory
//
// Two consumer warpgroups own 64 rows of K each; for dQ they share dS through shared memory and each takes half of the
// result. Of the third warpgroup a warp schedules, one thread is the producer (TMA), a warp brings dQ to dq_accum in
// global memory or sees to the order in which consumers do (dq/turns.h), and a warp writes dq from that.
//
// Before its own steps a tile prepares query rows for later ones (preprocess/prepared_rows.h).
//
//   consumer, step i   S, dP issued, dK(i - 1) in flight | exp under dP | dS | dV, barrier, dQ, dK | dQ out under dK
#pragma once

#include "../../../common/dependent_launch.h"
#include "../../hopper/budgets.h"
#include "../dq/adder.h"
#include "consumer.h"
#include "producer.h"
#include "scheduler.h"

namespace flash_attn::cuda::sm90::backward::single {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) backward_kernel(const __grid_constant__ KernelParams params) {
  if constexpr (Config::kBand) {
    if (params.condition.excludes()) return;
  }
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<SharedStorage<Config>*>(shared_bytes);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
  if (threadIdx.x == 0) {
    const auto init = [](uint64_t* barriers, int stages, int arrivals) {
      for (int i = 0; i < stages; ++i) mbarrier_init(&barriers[i], arrivals);
    };
    init(shared.k_full, Config::kStagesKV, 1);
    init(shared.v_full, Config::kStagesKV, 1);
    init(shared.kv_empty, Config::kStagesKV, 4 * Config::kConsumers);
    init(shared.tile_full, Config::kTileSlots, 1);
    init(shared.tile_empty, Config::kTileSlots, Config::kTileReaders);
    init(shared.q_full, Config::kStages, 1);
    init(shared.dout_full, Config::kStages, 1);
    init(shared.q_empty, Config::kStages, Config::kConsumers);
    init(shared.dout_empty, Config::kStages, Config::kConsumers);
    init(&shared.tile_wanted, 1, 1);
    init(shared.dq_empty, Config::kConsumers, 1);
    init_turns(shared.dq_turns, 128 * Config::kConsumers);
    init(shared.dq_added, Config::kTileSlots, 128 * Config::kConsumers);
    init(shared.piece_full, 2, 1);
    init(&shared.share_full, 1, 1);
    init(&shared.share_empty, 1, 128 * Config::kConsumers);
    init(&shared.deltas_full, 1, 128 * Config::kConsumers);
    init(&shared.deltas_empty, 1, 32);
    shared.share.pieces = 0;
    mbarrier_init_fence();
  }
  if (params.panels < Config::kPanels || params.panels_v < Config::kPanels) {
    clear_shared<Config::kThreads>(shared.k,
                                   sizeof(shared.k) + sizeof(shared.v) + sizeof(shared.q) + sizeof(shared.dout));
  }
  shared.weights.template init<typename Config::Element>();
  __syncthreads();
  grid_dependency_wait();  // for what was prepared, zeroed or cleared
  if (warpgroup == Config::kConsumers) {
    register_budget_lower<Config::kProducerRegisters>();
    if (warp == 0) {
      if (lane_id() == 0) Producer<Config>{params, shared}.run();
    } else if (warp == 3) {
      Scheduler<Config>{params, shared}.run();
    } else if constexpr (Config::kDqPath != DqPath::kOneCta) {
      const bool two_dq_warps = Config::kDqPath == DqPath::kWarp && params.is_ordered();
      if (warp == 2 && !two_dq_warps) {
        Writer<Config>{params, shared, static_cast<uint32_t>(lane_id())}.run();
      } else if constexpr (Config::kDqPath == DqPath::kWarp) {
        two_dq_warps ? add_dq<Config, 1>(params, shared, warp - 1) : add_dq<Config, 2>(params, shared, 0);
      } else {
        if (lane_id() == 0) follow_dq(params, shared);
      }
    }
  } else {
    register_budget_raise<Config::kConsumerRegisters>();
    Consumer<Config>{params, shared, warpgroup, warp, static_cast<int>(threadIdx.x % 32)}.run();
  }
}

}  // namespace flash_attn::cuda::sm90::backward::single
