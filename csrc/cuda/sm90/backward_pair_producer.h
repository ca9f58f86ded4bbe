// The third warpgroup of backward_pair_kernel.h: one thread copies tiles to shared memory, two see to the order in
// which tiles bring their dQ, one sees to the rows that the tile prepares.
#pragma once

#include "backward_pair_config.h"

namespace flash_attn::sm90 {

// ---- producer

/// Whether the sequence reaches the key rows of CTA `rank`, and a query row sees the tile at all.
SM90_DEVICE bool has_rows(const BackwardTile& tile, int rank) {
  return tile.m_begin < tile.m_end && tile.n_begin + 64 * rank < tile.seqlen_k;
}

/// The CTAs of a pair share out the blocks that their tile prepares. Of this CTA's: process(index in the share, phase
/// of barriers that complete once a block).
template <typename Process>
SM90_DEVICE void for_own_prepared(const BackwardTile& tile, int rank, Process process) {
  uint32_t phase = 0;
#pragma unroll 1
  for (int i = rank; i < tile.prepared_blocks; i += 2, phase ^= 1) process(i, phase);
}

template <typename Config>
struct BackwardPairProducer {
  const BackwardKernelParams& params;
  BackwardPairStorage<Config>& shared;
  const int rank;

  SM90_DEVICE void load_panels(uint8_t* buffer, const CUtensorMap& map, uint64_t* full, int first, int end, int x,
                               int y, int head, int batch) {
    for (int panel = first; panel < end; ++panel) {
      tma_load(buffer + (panel - first) * Config::kPanelBytes, &map, full, {64 * panel, x, y, head, batch});
    }
  }

  /// Panels [first, end) of the key rows of CTA `of`, or none if no rows are there: the kernel has zeroed them then.
  SM90_DEVICE void load_kv(uint8_t* buffer, const CUtensorMap& map, uint64_t* full, int first, int end, int of) {
    const BackwardTile& tile = shared.tile;
    if (!has_rows(tile, of)) return;
    load_panels(buffer, map, full, first, end, tile.kv_x + of * Config::kRowsN, tile.kv_y, tile.kv_head, tile.kv_batch);
  }

  SM90_DEVICE void load_v() {
    mbarrier_arrive_expect(&shared.v_full, has_rows(shared.tile, rank) ? params.panels_v * Config::kPanelBytes : 0);
    load_kv(shared.v, params.v, &shared.v_full, 0, params.panels_v, rank);
  }

  SM90_DEVICE void load_k() {
    const int peer_first = 2 * rank, peer_end = min(peer_first + 2, params.panels);
    const int own = has_rows(shared.tile, rank) ? params.panels : 0;
    const int peer = has_rows(shared.tile, rank ^ 1) ? max(0, peer_end - peer_first) : 0;
    mbarrier_arrive_expect(&shared.k_full, (own + peer) * Config::kPanelBytes);
    load_kv(shared.k, params.k, &shared.k_full, 0, params.panels, rank);
    load_kv(shared.k_peer, params.k, &shared.k_full, peer_first, peer_end, rank ^ 1);
  }

  SM90_DEVICE void load_q(int step, int head, int m_block) {
    const BackwardTile& tile = shared.tile;
    uint64_t* const full = &shared.q_full[step % 2];
    mbarrier_wait(&shared.q_empty[step % 2], step / 2 % 2 ^ 1);
    mbarrier_arrive_expect(full, params.panels * Config::kPanelBytes + Config::kBytesStatistics);
    load_panels(shared.q[step % 2], params.q, full, 0, params.panels, tile.q_x + m_block * Config::kBlockM, tile.q_y,
                tile.q_head + head, tile.q_batch);
  }

  SM90_DEVICE void load_statistics(int step, int head, int m_block) {
    const int64_t block = shared.tile.block + head * params.num_blocks + m_block;
    bulk_load(shared.statistics[step % 2], params.statistics + block * Config::kBlockM, Config::kBytesStatistics,
              &shared.q_full[step % 2]);
  }

  SM90_DEVICE void load_dout(int step, int head, int m_block) {
    const BackwardTile& tile = shared.tile;
    mbarrier_wait(&shared.dout_empty, step % 2 ^ 1);
    mbarrier_arrive_expect(&shared.dout_full, params.panels_v * Config::kPanelBytes);
    load_panels(shared.dout, params.dout, &shared.dout_full, 0, params.panels_v, tile.q_x + m_block * Config::kBlockM,
                tile.q_y, tile.q_head + head, tile.q_batch);
  }

  SM90_DEVICE void run() {
    const BackwardTile& tile = shared.tile;
    load_k();
    if (tile.m_begin == tile.m_end) load_v();
    int step = 0;
    for (int head = 0; head < tile.num_heads; ++head) {
      int m_block = tile.m_first;
      for (int left = tile.m_end - tile.m_begin; left > 0;
           --left, ++step, m_block = next_block<Config>(tile, m_block)) {
        if (step == 1) mbarrier_wait(&shared.all_prepared, 0);  // their out lies where this Q comes
        load_q(step, head, m_block);
        if (step == 0) load_v();
        if (m_block == tile.m_first && params.preparation.enabled()) {
          await_prepared(params, tile, head);
          global_proxy_fence();
        }
        load_statistics(step, head, m_block);
        load_dout(step, head, m_block);
      }
    }
  }
};

// ---- preparation of rows

/// One thread sees to the rows that the tile prepares: chooses them when the kernel has begun, copies out and dO of a
/// block, and counts it when consumers are through with it.
template <typename Config>
struct BackwardPairPreparer {
  const BackwardKernelParams& params;
  BackwardPairStorage<Config>& shared;
  const int rank;

  /// To buffers that the first step does not use at its start.
  SM90_DEVICE void load_block(int i) {
    const QueryShare& share = shared.prepared_share;
    const SharedBlock at = block_of_share(share, i);
    const int x = share.q_x + at.m_block * Config::kBlockM, head = share.q_head + at.head;
    uint64_t* const full = &shared.prepared_full;
    mbarrier_arrive_expect(full, 2 * params.panels_v * Config::kPanelBytes);
    for (int panel = 0; panel < params.panels_v; ++panel) {
      tma_load(shared.q[1] + panel * Config::kPanelBytes, &params.preparation.out, full,
               {64 * panel, x, share.q_y, head, share.q_batch});
      tma_load(prepared_dout(shared, panel), &params.dout, full, {64 * panel, x, share.q_y, head, share.q_batch});
    }
  }

  SM90_DEVICE void load_or_end(int i, int blocks) {
    if (i < blocks) {
      load_block(i);
    } else {
      mbarrier_arrive(&shared.all_prepared);
    }
  }

  SM90_DEVICE void count_block(int i) {
    const QueryShare& share = shared.prepared_share;
    add_to_count(prepared_count(params, share.batch_head, block_of_share(share, i).head));
  }

  SM90_DEVICE void run() {
    if (!params.preparation.enabled()) {
      mbarrier_arrive(&shared.all_prepared);
      return;
    }
    const int blocks = choose_prepared<Config>(params, blockIdx.x / 2, shared.prepared_share);
    shared.tile.prepared_blocks = blocks;
    mbarrier_arrive(&shared.share_chosen);
    load_or_end(rank, blocks);
    for_own_prepared(shared.tile, rank, [&](int i, uint32_t phase) {
      mbarrier_wait(&shared.prepared_empty, phase);
      load_or_end(i + 2, blocks);
      count_block(i);  // takes a while
    });
  }
};

}  // namespace flash_attn::sm90
