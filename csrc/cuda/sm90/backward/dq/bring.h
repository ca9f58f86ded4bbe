// A block's dQ on its way from shared memory to dq_accum, by a warp of a kernel whose consumers do not add it
// themselves.
#pragma once

#include "writer.h"

namespace flash_attn::cuda::sm90::backward {

/// Of kCount consumers from the first one on. One alone has its `turn`, in a fixed order: wait(count) until it has
/// come, stores() if no tile came before, ends() if `count` is to tell the next. Else whoever claims the block stores,
/// and the others add.
template <typename Config, int kCount, typename Turn>
FLASH_ATTN_DEVICE void bring_dq(const KernelParams& params, single::SharedStorage<Config>& shared, int first_consumer,
                                const Tile& tile, int block, int* count, const Turn& turn) {
  const auto elected = [] { return lane_id() == 0; };  // no register for it
  bool first = false, stored = false;                  // by this tile, by another
  if (elected()) {                                     // while dQ is being computed
    if constexpr (kCount == 1) {
      turn.wait(count);
      first = turn.stores();
    } else {
      stored = is_stored<1>(load_acquire(count));
    }
    global_proxy_fence();
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int consumer = first_consumer + i;
    float* const to = params.dq_accum + (int64_t{block} * Config::kConsumers + consumer) * kDqTile;
    named_barrier_sync(single::kDqReady + consumer, 160);
    if (elected()) {
      if (kCount > 1 && i == 0 && !stored) {
        first = claim_block(count, tile.index);
        global_proxy_fence();
      }
      if (first) {
        bulk_store(to, shared.dq[consumer], kDqTile * sizeof(float));
      } else {
        bulk_reduce_add(to, shared.dq[consumer], kDqTile * sizeof(float));
      }
      tma_store_commit();
    }
  }
  if (elected()) {
    if constexpr (kCount > 1) {
      tma_store_wait_read<1>();
      mbarrier_arrive(&shared.dq_empty[0]);
    }
    tma_store_wait_read();
    mbarrier_arrive(&shared.dq_empty[first_consumer + kCount - 1]);
    if (kCount == 1 ? turn.ends() : first) {
      tma_store_wait();     // the sum has arrived
      add_to_count(count);  // the next turn has come; or stored
    }
  }
  __syncwarp();
}

}  // namespace flash_attn::cuda::sm90::backward
