// Attention of few query rows over many keys, whose time is that of reading the keys and values once.
//
// A CTA has a share of all blocks of keys (units.h). It copies them through a ring of stages in shared memory, whatever
// tile they belong to, so that the next tile's keys are under way while this one's results are written; products are
// mma.sync on packed rows (config.h). Tiles that several CTAs have a part of are put together by the last (parts.h).
#pragma once

#include "../common/dependent_launch.h"
#include "loading.h"
#include "output.h"

namespace flash_attn::cuda::decode {

/// Until all but the last stages - 2 copies of this thread are there: those of the stage that is next.
FLASH_ATTN_DEVICE void wait_for_stage(int stages) {
  switch (stages) {
    case 2: return sm80::cp_async_wait<0>();
    case 3: return sm80::cp_async_wait<1>();
    case 4: return sm80::cp_async_wait<2>();
    case 5: return sm80::cp_async_wait<3>();
    default: return sm80::cp_async_wait<4>();
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(128) unsigned char memory[];
  Merge<C> merge(memory);
  const uint32_t stages = sm80::shared_address(memory) + (Merge<C>::kBytes + 127) / 128 * 128;
  grid_launch_dependents();
  grid_dependency_wait();  // for whoever wrote the lengths, q and the cache, or still uses the workspace
  if (threadIdx.x == 0) open_arrivals(params);
  Unit first;
  const Share share = find_share<C>(params, merge.words, first);
  if (share.begin >= share.end) return;

  Loader<C> loader(params, merge.board, first, share.end);
  WarpState<C> state(merge.queries);
  const WarpPlace<C> place;
  LaneRows rows;
  const int units = share.end - share.begin;
  int filled = 0, stage = 0;  // the stages that are filled and used next
  for (int unit = 1 - params.stages; unit < units; ++unit) {
    if (unit >= 0) {
      wait_for_stage(params.stages);
      __syncthreads();  // everyone's copies of this stage are there, what is said of it, and the one to fill is free
    }
    if (loader.more()) loader.load(filled, stages + filled * C::kStageBytes);
    sm80::cp_async_commit();
    if (++filled == params.stages) filled = 0;
    const bool first_of_all = unit == 1 - params.stages;
    if (unit < 0 && !first_of_all) continue;
    if (first_of_all) __syncthreads();  // what is said of the first tile is there
    const BlockInfo block = merge.board.blocks[stage];
    const TileInfo& t = merge.board.tiles[block.slot];
    // The first tile's queries are read while its keys are under way.
    if (first_of_all || (unit > 0 && block.begins)) rows = state.start(params, t, place.first_row);
    if (unit < 0) continue;
    state.process(params, t, rows, stages + stage * C::kStageBytes, block.first_key, block.partial, place);
    if (++stage == params.stages) stage = 0;
    if (block.ends) {
      finish_tile(params, t, share, state, place, merge);
      state.reset();
    }
  }
  sm80::cp_async_wait<0>();
}

}  // namespace flash_attn::cuda::decode
