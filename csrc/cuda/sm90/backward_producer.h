// The third warpgroup of backward_kernel.h: one thread works out tiles, one copies them to shared memory, two warps
// take dQ out of it.
#pragma once

#include "backward_config.h"

namespace flash_attn::sm90 {

// ---- scheduler

SM90_DEVICE int first_tile(const BackwardSchedule& schedule) {
  return schedule.order == BackwardSchedule::kWholeHead ? blockIdx.x * schedule.num_n_blocks : blockIdx.x;
}

SM90_DEVICE int next_tile(const BackwardSchedule& schedule, int index) {
  if (schedule.next_tile != nullptr) return gridDim.x + atomicAdd(schedule.next_tile, 1);
  if (schedule.order != BackwardSchedule::kWholeHead) return index + gridDim.x;
  return (index + 1) % schedule.num_n_blocks != 0 ? index + 1 : index + 1 + (gridDim.x - 1) * schedule.num_n_blocks;
}

/// Works out a tile while the last steps of the one before are worked on; not sooner, because a CTA with a long tile
/// should not take another one early.
template <typename Config>
SM90_DEVICE void schedule_tiles(const BackwardKernelParams& params, BackwardStorage<Config>& shared) {
  BackwardTileRing<Config> tiles;
  int index = first_tile(params.schedule);
  while (index < params.schedule.num_tiles) {
    mbarrier_wait(&shared.tile_empty[tiles.slot()], tiles.slot_phase() ^ 1);
    if (make_backward_tile<Config::kBlockM, Config::kBlockN>(params, index, shared.tiles[tiles.slot()])) {
      mbarrier_arrive(&shared.tile_full[tiles.slot()]);
      mbarrier_wait(&shared.tile_wanted, tiles.count % 2);
      ++tiles.count;
    }
    index = next_tile(params.schedule, index);
  }
  mbarrier_wait(&shared.tile_empty[tiles.slot()], tiles.slot_phase() ^ 1);
  shared.tiles[tiles.slot()].num_heads = -1;  // ends the other warps
  mbarrier_arrive(&shared.tile_full[tiles.slot()]);
}

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

  SM90_DEVICE void load_tile(const BackwardTile& tile) {
    load_kv(params.k, params.panels, shared.k[tiles.stage_kv()], &shared.k_full[tiles.stage_kv()], tile);
    for (int head = 0; head < tile.num_heads; ++head) {
      for (int m_block = tile.m_begin; m_block < tile.m_end; ++m_block) {
        load_q(tile, head, m_block);
        if (head == 0 && m_block == tile.m_begin) load_v(tile);  // wanted after the first Q
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
      mbarrier_wait(&shared.kv_empty[tiles.stage_kv()], tiles.phase_kv() ^ 1);
      load_tile(tile);
      mbarrier_arrive(&shared.tile_wanted);
      mbarrier_arrive(&shared.tile_empty[tiles.slot()]);
      ++tiles.count;
    }
  }
};

// ---- dQ warps: one thread of each adds a consumer's dQ from shared to global memory

template <typename Config>
SM90_DEVICE void store_dq(const BackwardKernelParams& params, BackwardStorage<Config>& shared, int consumer) {
  BackwardTileRing<Config> tiles;
  const bool elected = threadIdx.x % 32 == 0;
  while (true) {
    mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
    const BackwardTile& tile = shared.tiles[tiles.slot()];
    if (tile.num_heads < 0) break;
    for (int head = 0; head < tile.num_heads; ++head) {
      int64_t block = tile.block + head * params.num_blocks + tile.m_begin;
      for (int steps = tile.m_end - tile.m_begin; steps > 0; --steps, ++block) {
        int* const turns = params.dq_turns != nullptr ? params.dq_turns + block * kDqTurns + consumer : nullptr;
        if (elected && turns != nullptr) {  // while dQ is being computed
          wait_for_turn(turns, dq_turn<Config::kBlockM, Config::kBlockN>(params, tile, tile.m_end - steps));
        }
        __syncwarp();
        named_barrier_sync(kDqReady + consumer, 160);
        if (elected) {
          bulk_reduce_add(params.dq_accum + (block * Config::kConsumers + consumer) * kDqTile, shared.dq[consumer],
                          kDqTile * sizeof(float));
          tma_store_commit();
          tma_store_wait_read();
          mbarrier_arrive(&shared.dq_empty[consumer]);
          if (turns != nullptr) {
            tma_store_wait();  // the sum has arrived
            end_turn(turns);
          }
        }
        __syncwarp();
      }
    }
    if (elected) mbarrier_arrive(&shared.tile_empty[tiles.slot()]);
    ++tiles.count;
  }
  if (elected) tma_store_wait();  // shared memory must outlive the copies
}

// ---- order of dQ that the consumers add themselves

template <typename Config>
SM90_DEVICE void order_dq(const BackwardKernelParams& params, BackwardStorage<Config>& shared, int consumer) {
  BackwardTileRing<Config> tiles;
  uint32_t step = 0;
  while (true) {
    mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
    const BackwardTile& tile = shared.tiles[tiles.slot()];
    if (tile.num_heads < 0) break;
    for (int head = 0; head < tile.num_heads; ++head) {
      for (int m_block = tile.m_begin; m_block < tile.m_end; ++m_block, ++step) {
        const int64_t block = tile.block + head * params.num_blocks + m_block;
        take_turn(params.dq_turns + block * kDqTurns + consumer,
                  dq_turn<Config::kBlockM, Config::kBlockN>(params, tile, m_block), shared.dq_turns[consumer], step);
      }
    }
    mbarrier_arrive(&shared.tile_empty[tiles.slot()]);
    ++tiles.count;
  }
}

}  // namespace flash_attn::sm90
