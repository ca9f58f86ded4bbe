// Backward pass where a score is more than scale * q.k, or attn_mask hides some: single/kernel.h, of which each warp
// has more to do.
//
//   scheduler   lists the query blocks that a tile visits (steps.h); the others walk this list
//   producer    also attn_mask's values, where they are to be added and the copy engine reaches them
//   consumers   lse and delta from shared memory, where they lie as floats: a bias or softcap comes between the product
//               and lse. Bits of attn_mask and dropout's while S and dP are being computed (scores.h)
//
// Another launch prepares all rows and turns dq_accum to dq. Where consumers add dQ themselves, dq_accum is 0 at first.
#pragma once

#include "../../../common/dependent_launch.h"
#include "../../hopper/budgets.h"
#include "adder.h"
#include "consumer.h"
#include "producer.h"
#include "scheduler.h"

namespace flash_attn::cuda::sm90::backward::extended {

template <typename Config>
FLASH_ATTN_DEVICE void init_barriers(const KernelParams& params, SharedStorage<Config>& shared) {
  const auto init = [](uint64_t* barriers, int stages, int arrivals) {
    for (int i = 0; i < stages; ++i) mbarrier_init(&barriers[i], arrivals);
  };
  init(shared.k_full, Config::kStagesKV, 1);
  init(shared.v_full, Config::kStagesKV, 1);
  init(shared.kv_empty, Config::kStagesKV, 4 * Config::kConsumers);
  init(shared.tile_full, Config::kTileSlots, 1);
  init(shared.tile_empty, Config::kTileSlots, num_step_readers<Config>(params));
  init(shared.steps_full, kChunks, 32);  // lanes that list
  init(shared.steps_empty, kChunks, num_step_readers<Config>(params));
  init(shared.q_full, Config::kStages, 1);
  init(shared.dout_full, Config::kStages, 1);
  init(shared.q_empty, Config::kStages, Config::kConsumers);
  init(shared.dout_empty, Config::kStages, Config::kConsumers);
  init(&shared.bias_full, 1, 1);
  init(&shared.bias_empty, 1, 4 * Config::kConsumers);
  init(&shared.tile_wanted, 1, 1);
  init(shared.dq_empty, Config::kConsumers, 1);
  init_turns(shared.dq_turns, 128 * Config::kConsumers);
  init_turns(shared.dmask_turns, 128 * Config::kConsumers);
  mbarrier_init_fence();
  shared.list.chunk = 0;
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) backward_kernel(const __grid_constant__ KernelParams params) {
  if (params.condition.excludes()) return;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<SharedStorage<Config>*>(shared_bytes);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
  if (threadIdx.x == 0) init_barriers(params, shared);
  if (params.panels < Config::kPanels || params.panels_v < Config::kPanels) {
    clear_shared<Config::kThreads>(shared.k,
                                   sizeof(shared.k) + sizeof(shared.v) + sizeof(shared.q) + sizeof(shared.dout));
  }
  grid_dependency_wait();  // for what was prepared, zeroed or cleared
  const ForwardParams& problem = params.problem;
  if (threadIdx.x == 0 && problem.dropout_p > 0.0) {
    shared.dropout = make_dropout(problem.rng_state, problem.dropout_p);
  }
  __syncthreads();
  if (warpgroup == Config::kConsumers) {
    register_budget_lower<Config::kProducerRegisters>();
    if (warp == 0) {
      if (lane_id() == 0) Producer<Config>{{params, shared}, shared}.run();
    } else if (warp == 3) {
      Scheduler<Config>{{params, shared}, shared}.run();
    } else if (warp == 2 && params.extended.dmask_counters != nullptr) {
      if (lane_id() == 0) follow_dmask(params, shared);
    } else if constexpr (Config::kDqPath == DqPath::kWarp) {
      if (params.is_ordered()) {
        add_dq<Config, 1>(params, shared, warp - 1);
      } else if (warp == 1) {
        add_dq<Config, 2>(params, shared, 0);
      }
    } else {
      if (warp == 1 && lane_id() == 0) follow_dq(params, shared);
    }
  } else {
    register_budget_raise<Config::kConsumerRegisters>();
    Consumer<Config>{{params, shared, warpgroup, warp, static_cast<int>(threadIdx.x % 32)}, shared}.run();
  }
}

}  // namespace flash_attn::cuda::sm90::backward::extended
