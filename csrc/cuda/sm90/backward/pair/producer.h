// One thread of kernel.h's third warpgroup copies tiles to shared memory.
#pragma once

#include "../../hopper/tma.h"
#include "../schedule/walk.h"
#include "config.h"

namespace flash_attn::cuda::sm90::backward::pair {

/// Whether the sequence reaches the key rows of CTA `rank`, and a query row sees the tile at all.
FLASH_ATTN_DEVICE bool has_rows(const Tile& tile, int rank) {
  return tile.m_begin < tile.m_end && tile.n_begin + 64 * rank < tile.seqlen_k;
}

template <typename Config>
struct Producer {
  const KernelParams& params;
  SharedStorage<Config>& shared;
  const int rank;

  FLASH_ATTN_DEVICE void load_panels(uint8_t* buffer, const CUtensorMap& map, uint64_t* full, int first, int end, int x,
                                     int y, int head, int batch) {
    const auto load = [&](int panel) {
      tma_load(buffer + (panel - first) * Config::kPanelBytes, &map, full, {64 * panel, x, y, head, batch});
    };
    if constexpr (Config::kExtended) {  // has fewer registers left
#pragma unroll 1
      for (int panel = first; panel < end; ++panel) load(panel);
    } else {
      for (int panel = first; panel < end; ++panel) load(panel);
    }
  }

  /// Panels [first, end) of the key rows of CTA `of`, or none if no rows are there: the kernel has zeroed them then.
  FLASH_ATTN_DEVICE void load_kv(uint8_t* buffer, const CUtensorMap& map, uint64_t* full, int first, int end, int of) {
    const Tile& tile = shared.tile;
    if (!has_rows(tile, of)) return;
    load_panels(buffer, map, full, first, end, tile.kv_x + of * Config::kRowsN, tile.kv_y, tile.kv_head, tile.kv_batch);
  }

  FLASH_ATTN_DEVICE void load_v() {
    mbarrier_arrive_expect(&shared.v_full, has_rows(shared.tile, rank) ? params.panels_v * Config::kPanelBytes : 0);
    load_kv(shared.v, params.v, &shared.v_full, 0, params.panels_v, rank);
  }

  FLASH_ATTN_DEVICE void load_k() {
    const int peer_first = 2 * rank, peer_end = min(peer_first + 2, params.panels);
    const int own = has_rows(shared.tile, rank) ? params.panels : 0;
    const int peer = has_rows(shared.tile, rank ^ 1) ? max(0, peer_end - peer_first) : 0;
    mbarrier_arrive_expect(&shared.k_full, (own + peer) * Config::kPanelBytes);
    load_kv(shared.k, params.k, &shared.k_full, 0, params.panels, rank);
    load_kv(shared.k_peer, params.k, &shared.k_full, peer_first, peer_end, rank ^ 1);
  }

  FLASH_ATTN_DEVICE void load_q(int step, int head, int m_block) {
    const Tile& tile = shared.tile;
    uint64_t* const full = &shared.q_full[step % 2];
    mbarrier_wait(&shared.q_empty[step % 2], step / 2 % 2 ^ 1);
    mbarrier_arrive_expect(full, params.panels * Config::kPanelBytes + Config::kBytesStatistics);
    load_panels(shared.q[step % 2], params.q, full, 0, params.panels, tile.q_x + m_block * Config::kBlockM, tile.q_y,
                tile.q_head + head, tile.q_batch);
  }

  FLASH_ATTN_DEVICE void load_statistics(int step, int64_t block) {
    bulk_load(shared.statistics[step % 2], params.statistics + block * Config::kBlockM, Config::kBytesStatistics,
              &shared.q_full[step % 2]);
  }

  FLASH_ATTN_DEVICE void load_dout(int step, int head, int m_block) {
    const Tile& tile = shared.tile;
    mbarrier_wait(&shared.dout_empty, step % 2 ^ 1);
    mbarrier_arrive_expect(&shared.dout_full, params.panels_v * Config::kPanelBytes);
    load_panels(shared.dout, params.dout, &shared.dout_full, 0, params.panels_v, tile.q_x + m_block * Config::kBlockM,
                tile.q_y, tile.q_head + head, tile.q_batch);
  }

  FLASH_ATTN_DEVICE void run() {
    const Tile& tile = shared.tile;
    load_k();
    if (tile.m_begin == tile.m_end) load_v();
    int step = 0;
    for_each_block<Config>(tile, [&](const BlockWalk<Config>& walk) {
      if (step == 1) mbarrier_wait(&shared.all_prepared, 0);  // their out lies where this Q comes
      load_q(step, walk.head, walk.m_block);
      if (step == 0) load_v();
      if (walk.starts_head() && params.preparation.enabled()) {
        await_prepared(params, tile, walk.head);
        global_proxy_fence();
      }
      load_statistics(step, walk.index(params));
      load_dout(step, walk.head, walk.m_block);
      ++step;
    });
  }
};

}  // namespace flash_attn::cuda::sm90::backward::pair
