// Forward pass: out = softmax(scale Q K^T) V and lse, a tile of query rows at a time (Dao et al., "FlashAttention",
// 2022; "FlashAttention-2", 2023), with Hopper's asynchronous copies and products (Shah et al., "FlashAttention-3",
// 2024).
//
// A CTA stays for the whole launch and works on one tile after the other. Two threads of its last warpgroup are the
// scheduler, which picks tiles, and the producer, which copies their Q, K and V to shared memory by TMA, as far ahead
// as the buffers reach. Each other warpgroup is a consumer and owns 64 of the tile's rows: S, P and O stay in its
// registers.
//
//   producer   Q | K(n) | K(n-1) V(n) | K(n-2) V(n-1) | ...            blocks of columns from right to left
//   consumer   S(n), softmax | S(n-1) and O += P V(n) in flight, softmax(n-1) as soon as S is done | ...
//
// Consumers take turns in issuing products (begin_issue), so that the softmax of one runs under the products of the
// others.
#pragma once

#include <cstddef>

#include "../../common/dependent_launch.h"
#include "consumer.h"
#include "producer.h"

namespace flash_attn::cuda::sm90::forward {

/// Q and K, whose panels beyond head_dim no copy will write.
template <typename Config>
FLASH_ATTN_DEVICE void clear_tiles(SharedStorage<Config>& shared) {
  uint4* const begin = reinterpret_cast<uint4*>(shared.q);
  constexpr int kBytes = Config::kStagesQ * Config::kBytesQ + Config::kStagesKV * Config::kBytesK;
  static_assert(sizeof(shared.q) + sizeof(shared.k) == kBytes, "k follows q");
  for (int i = threadIdx.x; i < kBytes / 16; i += Config::kThreads) begin[i] = {0, 0, 0, 0};
  async_proxy_fence();  // wgmma reads it
}

/// By one thread: the barriers, and the tensor maps on their way.
template <typename Config>
FLASH_ATTN_DEVICE void init_barriers(const KernelParams& params, SharedStorage<Config>& shared) {
  const auto init = [](uint64_t* barriers, int stages, int arrivals) {
    for (int i = 0; i < stages; ++i) mbarrier_init(&barriers[i], arrivals);
  };
  init(&shared.tile_ready, 1, Config::kSchedulerThreads);
  init(&shared.tile_wanted, 1, 1);
  init(shared.q_full, Config::kStagesQ, 1);
  init(shared.k_full, Config::kStagesKV, 1);
  init(shared.v_full, Config::kStagesKV, 1);
  init(shared.q_empty, Config::kStagesQ, 4 * Config::kConsumers);  // every warp, when it has stored its rows of out
  init(shared.k_empty, Config::kStagesKV, Config::kConsumers);
  init(shared.v_empty, Config::kStagesKV, Config::kConsumers);
  if constexpr (Config::kCluster) {
    auto& storage = static_cast<ClusterStorage<Config>&>(shared);
    init(&storage.peers_ready, 1, params.schedule.num_splits - 1);
    init(storage.parts_full, 4 * Config::kConsumers, 1);
  }
  mbarrier_init_fence();
  tma_prefetch_map(&params.q);
  tma_prefetch_map(&params.k);
  tma_prefetch_map(&params.v);
  tma_prefetch_map(&params.out);
}

/// Whoever makes the first tile reads parameters all over `params`, one after the other, each from a line that no
/// thread of the SM has read: these warps ask for the lines at once.
template <typename Params>
FLASH_ATTN_DEVICE void read_parameters(const Params& params, int warp) {
  constexpr int kLineWords = 16, kLines = sizeof(Params) / (4 * kLineWords), kWarps = 8;
  constexpr int kFirstLine = offsetof(KernelParams, problem) / (4 * kLineWords);
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(&params);
  for (int line = kFirstLine + warp; line < kLines; line += kWarps) {
    asm volatile("{.reg .pred never;\nsetp.eq.u32 never, %0, 0x9e3779b9;\n@never nanosleep.u32 0;}" ::"r"(
        words[kLineWords * line]));
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    forward_kernel(const __grid_constant__ typename Config::Params params) {
  if constexpr (Config::kBand) {
    grid_dependency_wait();  // for whoever looks for the band
    if (!params.band->is_band) return;
  }
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  StorageOf<Config>& shared = *reinterpret_cast<StorageOf<Config>*>(shared_bytes);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  // Where tiles are known without another launch's results, and no panel has to be cleared first.
  const bool begins_early = params.schedule.order != TileSchedule::kPacked && params.panels == Config::kPanels;
  if (warpgroup < Config::kConsumers) read_parameters(params, threadIdx.x / 32);
  if (threadIdx.x == 128 * Config::kConsumers) {
    init_barriers(params, shared);
    if (begins_early) Producer<Config>{params, shared}.begin();
  }
  if (params.panels < Config::kPanels) clear_tiles(shared);
  __syncthreads();
  if constexpr (Config::kCluster) cluster_arrive_relaxed();
  grid_launch_dependents();  // combine.h waits for the end of this kernel
  if (warpgroup == Config::kConsumers) {
    register_budget_lower<Config::kProducerRegisters>();
    if (threadIdx.x % 128 == 0) Producer<Config>{params, shared}.run(begins_early);
    if (threadIdx.x % 128 == 32) schedule_tiles<Config>(params, shared, begins_early);
  } else {
    register_budget_raise<Config::kConsumerRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
    Consumer<Config>{params, shared, warpgroup, warp, lane, {params.to_log2}}.run();
  }
}

}  // namespace flash_attn::cuda::sm90::forward
