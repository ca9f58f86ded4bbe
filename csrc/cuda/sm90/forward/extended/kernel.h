// The forward kernel with attn_mask and with rules of scores: as in ../kernel.h, but a tile visits only blocks in which
// one of its rows sees something, and between S and its softmax stand the rules of common/scores/scores.h.
#pragma once

#include "../kernel.h"
#include "consumer.h"
#include "producer.h"

namespace flash_attn::cuda::sm90::forward {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    extended_forward_kernel(const __grid_constant__ ExtendedParams params) {
  if (params.condition.excludes()) return;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  ExtendedStorage<Config>& shared = *reinterpret_cast<ExtendedStorage<Config>*>(shared_bytes);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kConsumers; ++i) {
      mbarrier_init(&shared.bias_full[i], 1);
      mbarrier_init(&shared.bias_empty[i], 4);
    }
    init_barriers<Config>(params, shared);  // with a fence
    const ForwardParams& p = params.problem;
    if (Config::kRules && p.dropout_p > 0) shared.dropout = make_dropout(p.rng_state, p.dropout_p);
  }
  if (params.panels < Config::kPanels) clear_tiles<Config>(shared);
  __syncthreads();
  grid_launch_dependents();  // combine.h waits for the end of this kernel
  if (warpgroup == Config::kConsumers) {
    register_budget_lower<Config::kProducerRegisters>();
    if (threadIdx.x % 128 == 0) ExtendedProducer<Config>{{params, shared}}.run();
    if (threadIdx.x % 128 / 32 == 1) schedule_extended_tiles<Config>(params, shared);
  } else {
    register_budget_raise<Config::kConsumerRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
    ExtendedConsumer<Config>{{params, shared, warpgroup, warp, lane, {params.to_log2}}}.run();
  }
}

}  // namespace flash_attn::cuda::sm90::forward
