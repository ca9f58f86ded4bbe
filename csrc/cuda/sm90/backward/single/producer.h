// One thread of kernel.h's third warpgroup copies tiles to shared memory.
#pragma once

#include "../../hopper/tma.h"
#include "../preprocess/prepared_rows.h"
#include "../schedule/walk.h"
#include "config.h"

namespace flash_attn::cuda::sm90::backward::single {

template <typename Config>
struct Producer {
  const KernelParams& params;
  SharedStorage<Config>& shared;
  Ring<Config::kStages> q;
  TileRing<Config> tiles;

  /// A box for each panel; `full` completes when all have arrived.
  template <int kPanelBytes>
  FLASH_ATTN_DEVICE void load(const CUtensorMap& map, int panels, uint8_t* buffer, uint64_t* full, int x, int y,
                              int head, int batch) {
    for (int panel = 0; panel < panels; ++panel) {
      tma_load(buffer + panel * kPanelBytes, &map, full, {64 * panel, x, y, head, batch});
    }
  }

  /// A tile that no query row sees may lie beyond the sequence: nothing is loaded then.
  FLASH_ATTN_DEVICE void load_kv(const CUtensorMap& map, int panels, uint8_t* buffer, uint64_t* full,
                                 const Tile& tile) {
    if (tile.m_begin == tile.m_end) panels = 0;
    mbarrier_arrive_expect(full, panels * Config::kPanelBytesKV);
    load<Config::kPanelBytesKV>(map, panels, buffer, full, tile.kv_x, tile.kv_y, tile.kv_head, tile.kv_batch);
  }

  FLASH_ATTN_DEVICE void load_v(const Tile& tile) {
    load_kv(params.v, params.panels_v, shared.v[tiles.stage_kv()], &shared.v_full[tiles.stage_kv()], tile);
  }

  FLASH_ATTN_DEVICE void load_q(const Tile& tile, const BlockWalk<Config>& at) {
    uint64_t* const full = &shared.q_full[q.stage];
    mbarrier_wait(&shared.q_empty[q.stage], q.phase ^ 1);
    mbarrier_arrive_expect(full, params.panels * Config::kPanelBytesQ + Config::kBytesStatistics);
    load<Config::kPanelBytesQ>(params.q, params.panels, shared.q[q.stage], full,
                               tile.q_x + at.m_block * Config::kBlockM, tile.q_y, tile.q_head + at.head, tile.q_batch);
    const int64_t block = at.index(params);
    bulk_load(shared.statistics[q.stage], params.statistics + block * Config::kBlockM, Config::kBytesStatistics, full);
  }

  FLASH_ATTN_DEVICE void load_dout(const Tile& tile, const BlockWalk<Config>& at) {
    uint64_t* const full = &shared.dout_full[q.stage];
    mbarrier_wait(&shared.dout_empty[q.stage], q.phase ^ 1);
    mbarrier_arrive_expect(full, params.panels_v * Config::kPanelBytesQ);
    load<Config::kPanelBytesQ>(params.dout, params.panels_v, shared.dout[q.stage], full,
                               tile.q_x + at.m_block * Config::kBlockM, tile.q_y, tile.q_head + at.head, tile.q_batch);
  }

  /// out and dO of the blocks that the tile prepares, in place of Q and dO.
  FLASH_ATTN_DEVICE void load_prepared(const Tile& tile) {
    const QueryShare& share = shared.prepared_share;
    for (int i = 0; i < tile.prepared_blocks; ++i) {
      const BlockOfShare at = block_of_share(share, i);
      const auto load_block = [&](const CUtensorMap& map, uint8_t* buffer, uint64_t* full, uint64_t* empty) {
        mbarrier_wait(empty, q.phase ^ 1);
        mbarrier_arrive_expect(full, params.panels_v * Config::kPanelBytesQ);
        load<Config::kPanelBytesQ>(map, params.panels_v, buffer, full, share.q_x + at.m_block * Config::kBlockM,
                                   share.q_y, share.q_head + at.head, share.q_batch);
      };
      load_block(params.preparation.out, shared.q[q.stage], &shared.q_full[q.stage], &shared.q_empty[q.stage]);
      load_block(params.dout, shared.dout[q.stage], &shared.dout_full[q.stage], &shared.dout_empty[q.stage]);
      q.advance();
    }
  }

  FLASH_ATTN_DEVICE void load_tile(const Tile& tile) {
    load_kv(params.k, params.panels, shared.k[tiles.stage_kv()], &shared.k_full[tiles.stage_kv()], tile);
    for_each_block<Config>(tile, [&](const BlockWalk<Config>& walk) {
      load_q(tile, walk);
      if (walk.head == 0 && walk.starts_head()) load_v(tile);  // wanted after the first Q
      load_dout(tile, walk);
      q.advance();
    });
    if (tile.m_begin == tile.m_end) load_v(tile);
  }

  FLASH_ATTN_DEVICE void run() {
    while (true) {
      mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
      const Tile& tile = shared.tiles[tiles.slot()];
      if (tile.num_heads < 0) break;
      global_proxy_fence();  // the scheduler has seen the statistics written
      if (params.preparation.enabled()) load_prepared(tile);
      mbarrier_wait(&shared.kv_empty[tiles.stage_kv()], tiles.phase_kv() ^ 1);
      load_tile(tile);
      mbarrier_arrive(&shared.tile_wanted);
      mbarrier_arrive(&shared.tile_empty[tiles.slot()]);
      ++tiles.count;
    }
  }
};

}  // namespace flash_attn::cuda::sm90::backward::single
