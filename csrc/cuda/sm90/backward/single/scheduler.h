// A warp of kernel.h's third warpgroup: works out tiles, and finishes the rows that a tile prepares.
#pragma once

#include "../preprocess/row_preparer.h"
#include "config.h"

namespace flash_attn::cuda::sm90::backward::single {

/// In their order, and none before a CTA that works on it is running: tiles wait for tiles before them.
template <typename Config>
FLASH_ATTN_DEVICE int take_tile(const Schedule& schedule) {
  if (schedule.next_tile == nullptr) return blockIdx.x;
  const int ticket = atomicAdd(schedule.next_tile, 1);
  return Config::kDqPath == DqPath::kOneCta ? ticket * schedule.num_n_blocks : ticket;
}

template <typename Config>
FLASH_ATTN_DEVICE int next_tile(const Schedule& schedule, int index) {
  if (schedule.next_tile == nullptr) return schedule.num_tiles;
  const bool head_goes_on = Config::kDqPath == DqPath::kOneCta && (index + 1) % schedule.num_n_blocks != 0;
  return head_goes_on ? index + 1 : take_tile<Config>(schedule);
}

/// Works out a tile while the last steps of the one before are worked on; not sooner, because a CTA with a long tile
/// should not take another one early.
template <typename Config>
struct Scheduler {
  const KernelParams& params;
  SharedStorage<Config>& shared;
  TileRing<Config> tiles;

  /// By one thread: the tile, or the end; false for that.
  FLASH_ATTN_DEVICE bool publish_tile(int index) {
    Tile& tile = shared.tiles[tiles.slot()];
    mbarrier_wait(&shared.tile_empty[tiles.slot()], tiles.slot_phase() ^ 1);
    const bool found = make_tile<Config>(params, index, tile);
    if (!found) tile.num_heads = -1;  // ends the other warps
    if (found && params.preparation.enabled()) {
      tile.awaited_blocks = count_awaited<Config>(params, tile);
      tile.prepared_blocks = choose_prepared<Config>(params, index, shared.prepared_share);
      for (int head = 0; head < tile.num_heads; ++head) await_prepared(params, tile, head);
    }
    forget_derived(tiles.count);
    mbarrier_arrive(&shared.tile_full[tiles.slot()]);
    return found;
  }

  /// By a warp: between tiles it has the time for what is left to do for the rows that a tile prepares.
  FLASH_ATTN_DEVICE void run() {
    int index = lane_id() == 0 ? take_tile<Config>(params.schedule) : 0;
    for (;; ++tiles.count) {
      const bool found = lane_id() == 0 && publish_tile(index);
      if (!__any_sync(~0u, found)) break;
      __syncwarp();
      if (params.preparation.enabled()) {
        RowPreparer<Config>{params, shared}.prepare_rows(shared.tiles[tiles.slot()], tiles.count & 1);
      }
      if (lane_id() == 0) {
        mbarrier_wait(&shared.tile_wanted, tiles.count % 2);
        index = next_tile<Config>(params.schedule, index);
      }
      __syncwarp();
    }
  }
};

}  // namespace flash_attn::cuda::sm90::backward::single
