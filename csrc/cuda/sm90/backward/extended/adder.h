// What brings dQ to dq_accum beside the consumers of extended/kernel.h: as dq/adder.h. In a fixed order a turn is known
// by its number, which counts the tiles that visit the block.
#pragma once

#include "steps.h"

namespace flash_attn::cuda::sm90::backward::extended {

/// A warp adds dQ of kCount consumers from shared to global memory; in a fixed order each consumer has a warp. The
/// first tile of a block stores.
template <typename Config, int kCount>
FLASH_ATTN_DEVICE void add_dq(const KernelParams& params, SharedStorage<Config>& shared, int first_consumer) {
  constexpr bool kOrdered = kCount == 1;
  single::TileRing<Config> tiles;
  StepReader steps;
  const auto elected = [] { return lane_id() == 0; };  // no register for it
  while (true) {
    mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
    const Tile& tile = shared.tiles[tiles.slot()];
    if (tile.num_heads < 0) break;
    steps.template for_each<true>(shared, [&](const Step& step) {
      const int block = block_of_step(params, tile, step);
      BlockCounters& counters = params.dq_counters[block];
      int* const count = kOrdered ? &counters.added[first_consumer] : &counters.claim;
      bool first = false, stored = false;  // by this tile, by another
      if (elected()) {                     // while dQ is being computed
        if constexpr (kOrdered) {
          wait_for_count(count, step.before);
          first = step.before == 0;
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
          if (!kOrdered && i == 0 && !stored) {
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
        if (kOrdered || first) {
          tma_store_wait();     // the sum has arrived
          add_to_count(count);  // the next turn has come; or stored
        }
      }
      __syncwarp();
    });
    if (elected()) mbarrier_arrive(&shared.tile_empty[tiles.slot()]);
    ++tiles.count;
  }
  if (elected()) tma_store_wait();  // shared memory must outlive the copies
}

/// By one thread, where consumers add dQ themselves: in a fixed order tells them when it is their turn.
template <typename Config>
FLASH_ATTN_DEVICE void follow_dq(const KernelParams& params, SharedStorage<Config>& shared) {
  follow_steps<Config>(shared, [&](const Tile& tile, const Step& step, uint32_t number) {
    if (!params.is_ordered()) return;
    BlockCounters& block = params.dq_counters[block_of_step(params, tile, step)];
    wait_for_count(&block.added[0], step.before);
    say_turn(shared.dq_turns, number, false);
    end_turn(params, block, shared.dq_turns, number);
  });
}

}  // namespace flash_attn::cuda::sm90::backward::extended
