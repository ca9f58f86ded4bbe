// The scheduler's warp of extended/kernel.h: as single/scheduler.h, and it lists what a tile visits.
#pragma once

#include "../single/scheduler.h"
#include "dmask.h"

namespace flash_attn::cuda::sm90::backward::extended {

template <typename Config>
struct Scheduler : single::Scheduler<Config> {
  using Base = single::Scheduler<Config>;
  using Base::params, Base::tiles;

  SharedStorage<Config>& extended;

  FLASH_ATTN_DEVICE void run() {
    if (lane_id() == 0) extended.list.tile = single::take_tile<Config>(params.schedule);
    for (;; ++tiles.count) {
      const bool found = lane_id() == 0 && Base::publish_tile(tile_in_order(params, extended.list.tile));
      if (!__any_sync(~0u, found)) break;
      StepLister<Config>{params, extended}.list(extended.tiles[tiles.slot()]);
      if (lane_id() == 0) {
        mbarrier_wait(&extended.tile_wanted, tiles.count % 2);
        extended.list.tile = single::next_tile<Config>(params.schedule, extended.list.tile);
      }
      __syncwarp();
    }
  }
};

}  // namespace flash_attn::cuda::sm90::backward::extended
