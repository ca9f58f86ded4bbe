// What brings dQ to dq_accum beside the consumers of extended/kernel.h: as dq/adder.h. In a fixed order a turn is known
// by its number, which counts the tiles that visit the block.
#pragma once

#include "../dq/bring.h"
#include "steps.h"

namespace flash_attn::cuda::sm90::backward::extended {

/// A tile's turn at a block.
struct ListedTurn {
  int before;  // tiles that visit the block

  FLASH_ATTN_DEVICE void wait(const int* count) const { wait_for_count(count, before); }
  FLASH_ATTN_DEVICE bool stores() const { return before == 0; }
  FLASH_ATTN_DEVICE bool ends() const { return true; }
};

/// A warp adds dQ of kCount consumers from shared to global memory; in a fixed order each consumer has a warp.
template <typename Config, int kCount>
FLASH_ATTN_DEVICE void add_dq(const KernelParams& params, SharedStorage<Config>& shared, int first_consumer) {
  single::TileRing<Config> tiles;
  StepReader steps;
  while (true) {
    mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
    const Tile& tile = shared.tiles[tiles.slot()];
    if (tile.num_heads < 0) break;
    steps.template for_each<true>(shared, [&](const Step& step) {
      const int block = block_of_step(params, tile, step);
      BlockCounters& counters = params.dq_counters[block];
      int* const count = kCount == 1 ? &counters.added[first_consumer] : &counters.claim;
      bring_dq<Config, kCount>(params, shared, first_consumer, tile, block, count, ListedTurn{step.before});
    });
    if (lane_id() == 0) mbarrier_arrive(&shared.tile_empty[tiles.slot()]);
    ++tiles.count;
  }
  if (lane_id() == 0) tma_store_wait();  // shared memory must outlive the copies
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
