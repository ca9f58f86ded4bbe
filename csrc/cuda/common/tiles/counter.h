// The counter from which the CTAs of a launch take tiles.
#pragma once

#include "../ptx.h"
#include "schedule.h"

namespace flash_attn::cuda {

/// The counter of a launch whose CTAs share out tiles among themselves. The workspace is undefined when the kernel
/// starts, and a launch of its own to clear it costs 2 us: so CTA 0 opens the counter, and the others wait until it
/// carries this launch's id. The last ticket closes it, so that a graph can be replayed with the same id.
FLASH_ATTN_DEVICE void open_counter(TileCounter* counter, uint64_t launch_id) {
  counter->value = 0;
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(&counter->launch_id), "l"(launch_id) : "memory");
}

FLASH_ATTN_DEVICE void await_counter(TileCounter* counter, uint64_t launch_id) {
  uint64_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(&counter->launch_id) : "memory");
  } while (found != launch_id);
}

FLASH_ATTN_DEVICE int take_tile(TileCounter* counter) { return gridDim.x + atomicAdd(&counter->value, 1); }

/// After take_tile() said `index`. Every CTA takes tickets until one is beyond the last tile.
FLASH_ATTN_DEVICE void close_counter(TileCounter* counter, int index, int num_items) {
  if (index == num_items + static_cast<int>(gridDim.x) - 1) counter->launch_id = 0;
}

}  // namespace flash_attn::cuda
