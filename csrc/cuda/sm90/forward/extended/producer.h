// Scheduler and producer under attn_mask: as in ../producer.h, but blocks are those that are visited.
#pragma once

#include "../../../common/scores/scores.h"
#include "../producer.h"
#include "visited.h"

namespace flash_attn::cuda::sm90::forward {

/// gridDim.x, always read anew: registers are few.
FLASH_ATTN_DEVICE int grid_size() {
  int size;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(size));
  return size;
}

/// All lanes of a warp. The first is the scheduler, the others help it to list blocks.
template <typename Config>
FLASH_ATTN_DEVICE void schedule_extended_tiles(const ExtendedParams& params, ExtendedStorage<Config>& shared) {
  const TileSchedule& schedule = params.schedule;
  const auto counted = [&] { return schedule.next_tile != nullptr; };
  const auto is_first = [] { return lane_id() == 0; };
  if (schedule.order == TileSchedule::kPacked) grid_dependency_wait();  // for all that prepare.h writes
  if (counted() && blockIdx.x == 0 && is_first()) open_counter(schedule.next_tile, params.launch_id);
  const auto num_items = [&] { return num_work_items(schedule, params.problem); };  // registers are few
  int index = blockIdx.x;
  TileRing<Config> tiles;
  for (; index < num_items(); ++tiles.count) {
    ExtendedTile& tile = shared.tiles[tiles.slot()];
    if (is_first()) {
      make_tile<Config::kBlockM, Config::kBlockN>(schedule, params.problem, index, tile);
      if (Config::kRules) tile.slope = ScoreRules(params.problem, SequenceInfo{}, tile.batch, tile.head).slope;
    }
    __syncwarp();
    list_visited_blocks<Config>(params, tile, shared.lists[tiles.slot()]);
    mbarrier_arrive(&shared.tile_ready);
    if (is_first()) {
      if (counted() && tiles.count == 0) await_counter(schedule.next_tile, params.launch_id);
      mbarrier_wait(&shared.tile_wanted, tiles.tile_phase());  // the producer is about to run out of tiles
      index = grid_size() + (counted() ? atomicAdd(&schedule.next_tile->value, 1) : index);
    }
    index = __shfl_sync(~0u, index, 0);
  }
  if (is_first()) shared.tiles[tiles.slot()].num_blocks = 0;
  mbarrier_arrive(&shared.tile_ready);
  if (is_first()) {
    if (counted()) close_counter(schedule.next_tile, index, num_items());
  }
}

template <typename Config>
struct ExtendedProducer : Producer<Config> {
  using Base = Producer<Config>;
  using Base::load_k;
  using Base::load_q;
  using Base::load_v;
  using typename Base::KVRing;

  FLASH_ATTN_DEVICE void run() {
    auto& shared = static_cast<ExtendedStorage<Config>&>(this->shared);
    TileRing<Config> tiles;
    KVRing ring;
    uint32_t bias_phase = 0;  // of blocks so far
    for (;; ++tiles.count) {
      mbarrier_wait(&shared.tile_ready, tiles.tile_phase());
      const ExtendedTile& tile = shared.tiles[tiles.slot()];
      if (tile.num_blocks == 0) break;
      const int count = tile.num_visited, next_at = max(count - 1 - Base::kNextTileAt, 0);
      if (count == 0) {
        this->skip_q(tiles);
        mbarrier_arrive(&shared.tile_wanted);
        continue;
      }
      const bool listed = tile.listed;
      int n_block = shared.visited(tiles.slot(), listed, 0).n_block();
      // A consumer's values of a block may come when it has added those of the block before: consumer 0's before those
      // of the others, about when the block's V is wanted.
      const auto load_bias = [&](int begin, int end, int n_block) {
        if constexpr (Config::kBias == Bias::kStaged) {
          for (int i = begin; i < end; ++i) load_bias_of(i, tile, n_block, bias_phase);
        }
      };
      if (Config::kStagesQ == 1) load_k(tile, n_block, ring);  // a single Q is released late: K need not wait for it
      load_q(tile, tiles);
      if (Config::kStagesQ > 1) load_k(tile, n_block, ring);
      load_bias(0, 1, n_block);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        if (i == next_at) mbarrier_arrive(&shared.tile_wanted);
        const KVRing last = ring;
        const int last_block = n_block;
        ring.advance();
        if (i + 1 < count) {
          n_block = shared.visited(tiles.slot(), listed, i + 1).n_block();
          load_k(tile, n_block, ring);
        }
        load_bias(1, Config::kConsumers, last_block);
        load_v(tile, last_block, last);
        bias_phase ^= 1;
        if (i + 1 < count) load_bias(0, 1, n_block);
      }
    }
    mbarrier_wait(&shared.q_empty[tiles.stage()], tiles.phase() ^ 1);
    mbarrier_arrive(&shared.q_full[tiles.stage()]);  // the tile without blocks ends the consumers
  }

 private:
  /// attn_mask's values for a consumer's rows of a block.
  FLASH_ATTN_DEVICE void load_bias_of(int consumer, const ExtendedTile& tile, int n_block, uint32_t phase) {
    auto& shared = static_cast<ExtendedStorage<Config>&>(this->shared);
    const MaskView& mask = this->params.problem.mask;
    const int head = mask.head_size > 1 ? tile.head : 0, batch = mask.batch_size > 1 ? tile.batch : 0;
    uint64_t* const full = &shared.bias_full[consumer];
    mbarrier_wait(&shared.bias_empty[consumer], phase ^ 1);
    mbarrier_arrive_expect(full, Config::kBytesBias);
#pragma unroll 1
    for (int i = 0; i < Config::kBlockN / 64; ++i) {
      tma_load(shared.bias[consumer] + i * 64 * 128, &this->params.bias, full,
               {tile.col_begin + n_block * Config::kBlockN + 64 * i, tile.m_begin + 64 * consumer, head, batch, 0});
    }
  }

  /// A tile that visits nothing: its Q is not loaded.
  FLASH_ATTN_DEVICE void skip_q(TileRing<Config> tiles) {
    mbarrier_wait(&this->shared.q_empty[tiles.stage()], tiles.phase() ^ 1);
    mbarrier_arrive(&this->shared.q_full[tiles.stage()]);
  }
};

}  // namespace flash_attn::cuda::sm90::forward
