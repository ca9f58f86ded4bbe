// The two threads that keep the consumers of a CTA in work: the scheduler picks tiles, the producer copies them.
#pragma once

#include "../../common/dependent_launch.h"
#include "../../common/tiles/counter.h"
#include "../hopper/barriers.h"
#include "../hopper/tma.h"
#include "config.h"

namespace flash_attn::cuda::sm90::forward {

// ---- scheduler

/// A tile of the problem, or of the band that is found in its mask.
template <typename Config>
FLASH_ATTN_DEVICE void make_next_tile(const typename Config::Params& params, int index,
                                      typename Config::TileType& tile) {
  const mask::MaskKind* found = nullptr;
  if constexpr (Config::kBand) found = params.band;
  make_tile<Config::kBlockM, Config::kBlockN, Config::kCluster>(params.schedule, params.problem, index, tile, found);
}

/// Works out tiles one ahead of the producer: with 64-bit lengths and divisions that takes as long as a block of
/// columns. The first one may have been made before.
template <typename Config>
FLASH_ATTN_DEVICE void schedule_tiles(const typename Config::Params& params, SharedStorage<Config>& shared,
                                      bool first_is_made) {
  const TileSchedule& schedule = params.schedule;
  const bool counted = schedule.next_tile != nullptr;
  if (schedule.order == TileSchedule::kPacked) grid_dependency_wait();  // for all that prepare.h writes
  if (counted && blockIdx.x == 0) open_counter(schedule.next_tile, params.launch_id);
  const int num_items = num_work_items(schedule, params.problem);
  int index = blockIdx.x;
  TileRing<Config> tiles;
  for (; index < num_items; ++tiles.count) {
    if (!first_is_made || tiles.count > 0) {
      make_next_tile<Config>(params, index, shared.tiles[tiles.slot()]);
    }
    mbarrier_arrive(&shared.tile_ready);
    if (counted && tiles.count == 0) await_counter(schedule.next_tile, params.launch_id);
    mbarrier_wait(&shared.tile_wanted, tiles.tile_phase());  // the producer is about to run out of tiles
    index = counted ? take_tile(schedule.next_tile) : index + gridDim.x;
  }
  shared.tiles[tiles.slot()].num_blocks = 0;
  mbarrier_arrive(&shared.tile_ready);
  if (counted) close_counter(schedule.next_tile, index, num_items);
}

// ---- producer

template <typename Config>
struct Producer {
  using KVRing = Ring<Config::kStagesKV>;
  // The next tile is asked for when so many blocks are still to be loaded. Asking earlier would hand out the last tiles
  // before it is known which CTA is free first: benchmarks/experiments/004.
  static constexpr int kNextTileAt = 3;
  const typename Config::Params& params;
  SharedStorage<Config>& shared;

  /// A box for each panel of [rows][64] in the 128-byte swizzle; `full` completes when all have arrived. Panels beyond
  /// the tensor's head dimension are not loaded: see Tile::has_columns().
  template <int kPanelBytes, int kMostPanels>
  FLASH_ATTN_DEVICE void load(const CUtensorMap* map, int panels, uint8_t* tile, uint64_t* full, int x, int y, int head,
                              int batch) {
    mbarrier_arrive_expect(full, panels * kPanelBytes);
#pragma unroll
    for (int panel = 0; panel < kMostPanels; ++panel) {
      if (panel >= panels) break;
      tma_load(tile + panel * kPanelBytes, map, full, {64 * panel, x, y, head, batch});
    }
  }

  FLASH_ATTN_DEVICE void load_q(const Tile& tile, TileRing<Config> tiles) {
    const int stage = tiles.stage();
    mbarrier_wait(&shared.q_empty[stage], tiles.phase() ^ 1);
    load<Config::kPanelBytesQ, Config::kPanels>(&params.q, tile.has_columns() ? params.panels : 0, shared.q[stage],
                                                &shared.q_full[stage], tile.q_x, tile.q_y, tile.head, tile.q_batch);
  }

  FLASH_ATTN_DEVICE void load_k(const Tile& tile, int n_block, KVRing ring) {
    mbarrier_wait(&shared.k_empty[ring.stage], ring.phase ^ 1);
    load<Config::kPanelBytesKV, Config::kPanels>(
        &params.k, tile.has_columns() ? params.panels : 0, shared.k[ring.stage], &shared.k_full[ring.stage],
        tile.kv_x + n_block * Config::kBlockN, tile.kv_y, tile.kv_head, tile.kv_batch);
  }

  FLASH_ATTN_DEVICE void load_v(const Tile& tile, int n_block, KVRing ring) {
    mbarrier_wait(&shared.v_empty[ring.stage], ring.phase ^ 1);
    load<Config::kPanelBytesKV, Config::kPanelsV>(
        &params.v, tile.has_columns() ? params.panels_v : 0, shared.v[ring.stage], &shared.v_full[ring.stage],
        tile.kv_x + n_block * Config::kBlockN, tile.kv_y, tile.kv_head, tile.kv_batch);
  }

  FLASH_ATTN_DEVICE void load_q_and_k(const Tile& tile, TileRing<Config> tiles, KVRing ring) {
    if (Config::kStagesQ == 1) load_k(tile, tile.num_blocks - 1, ring);  // a single Q is released late: K need not wait
    load_q(tile, tiles);
    if (Config::kStagesQ > 1) load_k(tile, tile.num_blocks - 1, ring);
  }

  /// Makes the CTA's first tile and asks for its Q and K, while the other threads have not begun yet.
  FLASH_ATTN_DEVICE void begin() {
    make_next_tile<Config>(params, blockIdx.x, shared.tiles[0]);
    load_q_and_k(shared.tiles[0], {}, {});
  }

  FLASH_ATTN_DEVICE void run(bool has_begun) {
    TileRing<Config> tiles;
    KVRing ring;
    for (;; ++tiles.count) {
      mbarrier_wait(&shared.tile_ready, tiles.tile_phase());
      const Tile& tile = shared.tiles[tiles.slot()];
      int n_block = tile.num_blocks - 1;
      if (n_block < 0) break;
      if (!has_begun || tiles.count > 0) load_q_and_k(tile, tiles, ring);
      const int next_at = min(n_block, kNextTileAt);
#pragma unroll 1
      for (; n_block > 0; --n_block) {
        if (n_block == next_at) mbarrier_arrive(&shared.tile_wanted);
        const KVRing last = ring;
        ring.advance();
        load_k(tile, n_block - 1, ring);
        load_v(tile, n_block, last);
      }
      if (next_at == 0) mbarrier_arrive(&shared.tile_wanted);
      load_v(tile, 0, ring);
      ring.advance();
    }
    mbarrier_wait(&shared.q_empty[tiles.stage()], tiles.phase() ^ 1);
    mbarrier_arrive(&shared.q_full[tiles.stage()]);  // the tile without blocks ends the consumers
  }
};

}  // namespace flash_attn::cuda::sm90::forward
