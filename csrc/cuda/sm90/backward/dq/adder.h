// What brings dQ to dq_accum beside the consumers of single/kernel.h: a warp or two that take it out of shared memory,
// or a thread that sees to the consumers' turns.
#pragma once

#include "writer.h"

namespace flash_attn::cuda::sm90::backward {

/// Where the order is fixed: query blocks for which a tile has one turn. Messages to L2 and back take longer than a
/// step of 64 rows.
constexpr int kTurnBlocks = 2;

/// A tile's turn at a query block, and at its neighbour.
template <typename Config>
struct FixedTurn {
  const KernelParams& params;
  const Tile& tile;
  const int m_block;

  FLASH_ATTN_DEVICE int place() const { return m_block % kTurnBlocks; }
  /// Whether the neighbour in this direction has another turn, or none.
  FLASH_ATTN_DEVICE bool is_outermost(int step) const {
    return step < 0 ? place() == 0 || m_block == tile.m_begin : place() == kTurnBlocks - 1 || m_block + 1 == tile.m_end;
  }
  FLASH_ATTN_DEVICE bool begins() const { return is_outermost(-block_step<Config>(tile)); }
  FLASH_ATTN_DEVICE bool ends() const { return is_outermost(block_step<Config>(tile)); }
  FLASH_ATTN_DEVICE int tiles_before_blocks(int begin, int count) const {
    constexpr int kBlockM = Config::kBlockM;
    return tiles_before<Config>(params, tile, begin * kBlockM, (begin + count) * kBlockM);
  }
  FLASH_ATTN_DEVICE void wait(const int* count) const {
    if (begins()) wait_for_count(count, tiles_before_blocks(m_block - place(), kTurnBlocks));
  }
  FLASH_ATTN_DEVICE bool stores() const { return tiles_before_blocks(m_block, 1) == 0; }
};

/// Adds dQ of kCount consumers from shared to global memory. In a fixed order each consumer has a warp, so that none
/// waits for the other's turn.
template <typename Config, int kCount>
FLASH_ATTN_DEVICE void add_dq(const KernelParams& params, single::SharedStorage<Config>& shared, int first_consumer) {
  single::TileRing<Config> tiles;
  const auto elected = [] { return lane_id() == 0; };  // no register for it
  while (true) {
    mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
    const Tile& tile = shared.tiles[tiles.slot()];
    if (tile.num_heads < 0) break;
#pragma unroll 1
    for (BlockWalk<Config> walk(tile); !walk.ended(); walk.advance()) {
      const int block = walk.index(params);
      const FixedTurn<Config> turn{params, tile, walk.m_block};
      const int counted = kCount == 1 ? block - turn.place() : block;
      BlockCounters& counters = params.dq_counters[counted];
      int* const count = kCount == 1 ? &counters.added[first_consumer] : &counters.claim;
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
        named_barrier_sync(single::kDqReady + consumer, 160);
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
FLASH_ATTN_DEVICE void follow_dq(const KernelParams& params, single::SharedStorage<Config>& shared) {
  single::TileRing<Config> tiles;
  uint32_t step = 0;
  for (;; ++tiles.count) {
    mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
    const Tile& tile = shared.tiles[tiles.slot()];
    if (tile.num_heads < 0) break;
    if (params.has_turns()) follow_turns<TurnPart::kBoth, Config>(params, tile, shared.dq_turns, step);
    mbarrier_wait(&shared.dq_added[tiles.slot()], tiles.slot_phase());
    say_added(params, tile);
    mbarrier_arrive(&shared.tile_empty[tiles.slot()]);
  }
}

}  // namespace flash_attn::cuda::sm90::backward
