// Of the third warpgroup of backward_kernel.h: a warp works out tiles, one thread copies them to shared memory, a warp
// takes dQ out of it. The fourth warp is the dq writer of backward_dq.h.
#pragma once

#include "backward_dq.h"
#include "backward_row_preparer.h"

namespace flash_attn::sm90 {

// ---- scheduler

/// In their order, and none before a CTA that works on it is running: tiles wait for tiles before them.
template <typename Config>
SM90_DEVICE int take_tile(const BackwardSchedule& schedule) {
  if (schedule.next_tile == nullptr) return blockIdx.x;
  const int ticket = atomicAdd(schedule.next_tile, 1);
  return Config::kFusedDq ? ticket * schedule.num_n_blocks : ticket;
}

template <typename Config>
SM90_DEVICE int next_tile(const BackwardSchedule& schedule, int index) {
  if (schedule.next_tile == nullptr) return schedule.num_tiles;
  const bool head_goes_on = Config::kFusedDq && (index + 1) % schedule.num_n_blocks != 0;
  return head_goes_on ? index + 1 : take_tile<Config>(schedule);
}

/// Works out a tile while the last steps of the one before are worked on; not sooner, because a CTA with a long tile
/// should not take another one early.
template <typename Config>
struct BackwardScheduler {
  const BackwardKernelParams& params;
  BackwardStorage<Config>& shared;
  BackwardTileRing<Config> tiles;

  /// By one thread: the tile, or the end; false for that.
  SM90_DEVICE bool publish_tile(int index) {
    BackwardTile& tile = shared.tiles[tiles.slot()];
    mbarrier_wait(&shared.tile_empty[tiles.slot()], tiles.slot_phase() ^ 1);
    const bool found = make_backward_tile<Config>(params, index, tile);
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
  SM90_DEVICE void run() {
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

// ---- producer

template <typename Config>
struct BackwardProducer {
  const BackwardKernelParams& params;
  BackwardStorage<Config>& shared;
  Ring<Config::kStages> q;
  BackwardTileRing<Config> tiles;

  /// A box for each panel; `full` completes when all have arrived.
  template <int kPanelBytes>
  SM90_DEVICE void load(const CUtensorMap& map, int panels, uint8_t* buffer, uint64_t* full, int x, int y, int head,
                        int batch) {
    for (int panel = 0; panel < panels; ++panel) {
      tma_load(buffer + panel * kPanelBytes, &map, full, {64 * panel, x, y, head, batch});
    }
  }

  /// A tile that no query row sees may lie beyond the sequence: nothing is loaded then.
  SM90_DEVICE void load_kv(const CUtensorMap& map, int panels, uint8_t* buffer, uint64_t* full,
                           const BackwardTile& tile) {
    if (tile.m_begin == tile.m_end) panels = 0;
    mbarrier_arrive_expect(full, panels * Config::kPanelBytesKV);
    load<Config::kPanelBytesKV>(map, panels, buffer, full, tile.kv_x, tile.kv_y, tile.kv_head, tile.kv_batch);
  }

  SM90_DEVICE void load_v(const BackwardTile& tile) {
    load_kv(params.v, params.panels_v, shared.v[tiles.stage_kv()], &shared.v_full[tiles.stage_kv()], tile);
  }

  SM90_DEVICE void load_q(const BackwardTile& tile, int head, int m_block) {
    uint64_t* const full = &shared.q_full[q.stage];
    mbarrier_wait(&shared.q_empty[q.stage], q.phase ^ 1);
    mbarrier_arrive_expect(full, params.panels * Config::kPanelBytesQ + Config::kBytesStatistics);
    load<Config::kPanelBytesQ>(params.q, params.panels, shared.q[q.stage], full, tile.q_x + m_block * Config::kBlockM,
                               tile.q_y, tile.q_head + head, tile.q_batch);
    const int64_t block = tile.block + head * params.num_blocks + m_block;
    bulk_load(shared.statistics[q.stage], params.statistics + block * Config::kBlockM, Config::kBytesStatistics, full);
  }

  SM90_DEVICE void load_dout(const BackwardTile& tile, int head, int m_block) {
    uint64_t* const full = &shared.dout_full[q.stage];
    mbarrier_wait(&shared.dout_empty[q.stage], q.phase ^ 1);
    mbarrier_arrive_expect(full, params.panels_v * Config::kPanelBytesQ);
    load<Config::kPanelBytesQ>(params.dout, params.panels_v, shared.dout[q.stage], full,
                               tile.q_x + m_block * Config::kBlockM, tile.q_y, tile.q_head + head, tile.q_batch);
  }

  /// out and dO of the blocks that the tile prepares, in place of Q and dO.
  SM90_DEVICE void load_prepared(const BackwardTile& tile) {
    const QueryShare& share = shared.prepared_share;
    for (int i = 0; i < tile.prepared_blocks; ++i) {
      const SharedBlock at = block_of_share(share, i);
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

  SM90_DEVICE void load_tile(const BackwardTile& tile) {
    load_kv(params.k, params.panels, shared.k[tiles.stage_kv()], &shared.k_full[tiles.stage_kv()], tile);
    for (int head = 0; head < tile.num_heads; ++head) {
      int m_block = tile.m_first;
      for (int steps = tile.m_end - tile.m_begin; steps > 0; --steps, m_block = next_block<Config>(tile, m_block)) {
        load_q(tile, head, m_block);
        if (head == 0 && m_block == tile.m_first) load_v(tile);  // wanted after the first Q
        load_dout(tile, head, m_block);
        q.advance();
      }
    }
    if (tile.m_begin == tile.m_end) load_v(tile);
  }

  SM90_DEVICE void run() {
    while (true) {
      mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
      const BackwardTile& tile = shared.tiles[tiles.slot()];
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

// ---- dQ warp

/// Where the order is fixed: query blocks for which a tile has one turn. Messages to L2 and back take longer than a
/// step of 64 rows.
constexpr int kTurnBlocks = 2;

/// A tile's turn at a query block, and at its neighbour.
template <typename Config>
struct FixedTurn {
  const BackwardKernelParams& params;
  const BackwardTile& tile;
  const int m_block;

  SM90_DEVICE int place() const { return m_block % kTurnBlocks; }
  /// Whether the neighbour in this direction has another turn, or none.
  SM90_DEVICE bool is_outermost(int step) const {
    return step < 0 ? place() == 0 || m_block == tile.m_begin : place() == kTurnBlocks - 1 || m_block + 1 == tile.m_end;
  }
  SM90_DEVICE bool begins() const { return is_outermost(-block_step<Config>(tile)); }
  SM90_DEVICE bool ends() const { return is_outermost(block_step<Config>(tile)); }
  SM90_DEVICE int tiles_before_blocks(int begin, int count) const {
    constexpr int kBlockM = Config::kBlockM;
    return tiles_before<Config>(params, tile, begin * kBlockM, (begin + count) * kBlockM);
  }
  SM90_DEVICE void wait(const int* count) const {
    if (begins()) wait_for_count(count, tiles_before_blocks(m_block - place(), kTurnBlocks));
  }
  SM90_DEVICE bool stores() const { return tiles_before_blocks(m_block, 1) == 0; }
};

/// Adds dQ of kCount consumers from shared to global memory. In a fixed order each consumer has a warp, so that none
/// waits for the other's turn.
template <typename Config, int kCount>
SM90_DEVICE void store_dq(const BackwardKernelParams& params, BackwardStorage<Config>& shared, int first_consumer) {
  BackwardTileRing<Config> tiles;
  const auto elected = [] { return lane_id() == 0; };  // no register for it
  while (true) {
    mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
    const BackwardTile& tile = shared.tiles[tiles.slot()];
    if (tile.num_heads < 0) break;
    for (int head = tile.m_begin < tile.m_end ? 0 : tile.num_heads; head < tile.num_heads; ++head) {
      int m_block = tile.m_first;
      do {
        const int block = tile.block + head * params.num_blocks + m_block;
        const FixedTurn<Config> turn{params, tile, m_block};
        const int counted = kCount == 1 ? block - turn.place() : block;
        int* const count = params.dq_turns + int64_t{counted} * kDqTurns + first_consumer;
        bool first = false, stored = false;  // by this tile, by another
        if (elected()) {                     // while dQ is being computed
          if constexpr (kCount == 1) {
            turn.wait(count);
            first = turn.stores();
          } else {
            stored = is_stored<1>(load_acquire(count));
          }
          global_proxy_fence();
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int consumer = first_consumer + i;
          float* const to = params.dq_accum + (int64_t{block} * Config::kConsumers + consumer) * kDqTile;
          named_barrier_sync(kDqReady + consumer, 160);
          if (elected()) {
            if (kCount > 1 && i == 0 && !stored) {
              first = claim_block(count, tile.index);
              global_proxy_fence();
            }
            if (first) {
              bulk_store(to, shared.dq[consumer], kDqTile * sizeof(float));
            } else {
              bulk_reduce_add(to, shared.dq[consumer], kDqTile * sizeof(float));
            }
            tma_store_commit();
          }
        }
        if (elected()) {
          if constexpr (kCount > 1) {
            tma_store_wait_read<1>();
            mbarrier_arrive(&shared.dq_empty[0]);
          }
          tma_store_wait_read();
          mbarrier_arrive(&shared.dq_empty[first_consumer + kCount - 1]);
          if (kCount == 1 ? turn.ends() : first) {
            tma_store_wait();     // the sum has arrived
            add_to_count(count);  // the next turn has come; or stored
          }
        }
        __syncwarp();
        m_block = next_block<Config>(tile, m_block);
      } while (m_block != tile.m_first);
    }
    if (elected() && kCount > 1 && params.dq_writing.enabled()) {
      tma_store_wait();
      say_added(params, tile);
    }
    mbarrier_arrive(&shared.tile_empty[tiles.slot()]);
    __syncwarp();
    ++tiles.count;
  }
  if (elected()) tma_store_wait();  // shared memory must outlive the copies
}

/// By one thread, where consumers add dQ themselves: tells them when it is their turn, and others what they have added.
template <typename Config>
SM90_DEVICE void follow_dq(const BackwardKernelParams& params, BackwardStorage<Config>& shared) {
  BackwardTileRing<Config> tiles;
  uint32_t step = 0;
  for (;; ++tiles.count) {
    mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
    const BackwardTile& tile = shared.tiles[tiles.slot()];
    if (tile.num_heads < 0) break;
    if (params.dq_turns != nullptr) follow_turns<TurnPart::kBoth, Config>(params, tile, shared.dq_turns, step);
    mbarrier_wait(&shared.dq_added[tiles.slot()], tiles.slot_phase());
    say_added(params, tile);
    mbarrier_arrive(&shared.tile_empty[tiles.slot()]);
  }
}

}  // namespace flash_attn::sm90
