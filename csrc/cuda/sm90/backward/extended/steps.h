// Which query blocks a tile visits: those in which some row sees some of its keys, by causal, window and lengths and by
// attn_mask. The scheduler's warp lists them in chunks, a chunk or two ahead of those who walk them: the producer, the
// consumers, and who brings dQ away.
#pragma once

#include <type_traits>

#include "../schedule/walk.h"
#include "config.h"

namespace flash_attn::cuda::sm90::backward::extended {

/// Place in the ring of chunks.
struct StepReader {
  uint32_t chunk = 0;

  /// All steps of the next tile, by a thread, or by a warp that says once that it is through: visit(step), or
  /// visit(step, whether it is a chunk's first, last).
  template <bool kWarp, typename Storage, typename Visit>
  FLASH_ATTN_DEVICE void for_each(Storage& shared, Visit visit) {
    bool last;
    do {
      const int slot = chunk % kChunks;
      mbarrier_wait(&shared.steps_full[slot], chunk / kChunks % 2);
      const Step* step = shared.chunks[slot].steps;
#pragma unroll 1
      for (int left = shared.chunks[slot].count; left > 0; --left, ++step) {
        if constexpr (std::is_invocable_v<Visit, const Step&, bool, bool>) {
          visit(*step, step == shared.chunks[slot].steps, left == 1);
        } else {
          visit(*step);
        }
      }
      last = shared.chunks[slot].last != 0;
      if constexpr (kWarp) __syncwarp();
      if (!kWarp || lane_id() == 0) mbarrier_arrive(&shared.steps_empty[slot]);
      ++chunk;
    } while (!last);
  }
};

/// By one thread: all steps of all tiles, counted through: visit(tile, step, number).
template <typename Config, typename Visit>
FLASH_ATTN_DEVICE void follow_steps(SharedStorage<Config>& shared, Visit visit) {
  single::TileRing<Config> tiles;
  StepReader steps;
  uint32_t number = 0;
  while (true) {
    mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
    const Tile& tile = shared.tiles[tiles.slot()];
    if (tile.num_heads < 0) break;
    steps.template for_each<false>(shared, [&](const Step& step) { visit(tile, step, number++); });
    mbarrier_arrive(&shared.tile_empty[tiles.slot()]);
    ++tiles.count;
  }
}

/// All steps of a single tile, step by step, for who has to know whether there is another one before it ends a step.
template <typename Storage>
struct StepCursor {
  Storage& shared;
  uint32_t chunk = 0;
  int number = 0;  // in the chunk

  FLASH_ATTN_DEVICE const Step& at() const { return shared.chunks[chunk % kChunks].steps[number]; }

  /// To the first step; false if there is none.
  FLASH_ATTN_DEVICE bool begin() {
    await_chunk();
    return find_step();
  }
  /// To the next one.
  FLASH_ATTN_DEVICE bool advance() {
    ++number;
    return find_step();
  }

 private:
  FLASH_ATTN_DEVICE void await_chunk() const {
    mbarrier_wait(&shared.steps_full[chunk % kChunks], chunk / kChunks % 2);
  }
  FLASH_ATTN_DEVICE bool find_step() {
    while (number >= shared.chunks[chunk % kChunks].count) {
      const bool last = shared.chunks[chunk % kChunks].last != 0;
      mbarrier_arrive(&shared.steps_empty[chunk % kChunks]);
      if (last) return false;
      ++chunk;
      number = 0;
      await_chunk();
    }
    return true;
  }
};

/// Of the step, in dq_accum and statistics.
FLASH_ATTN_DEVICE int block_of_step(const KernelParams& params, const Tile& tile, const Step& step) {
  return tile.block + step.head * params.num_blocks + step.m_block;
}

/// By a warp, for tiles one after the other. Has few registers: its place in the ring lies in shared memory.
template <typename Config, typename Storage = SharedStorage<Config>>
struct StepLister {
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kChunkSteps = Config::kChunkSteps;
  using Chunk = StepChunk<kChunkSteps>;

  const KernelParams& params;
  Storage& shared;

  /// The number in TileClasses of a head's block of query block 0 and key block 0.
  FLASH_ATTN_DEVICE int first_block_of_head(const Tile& tile, int head) const {
    const TileClasses& classes = params.extended.classes;
    return params.split.heads.divide(tile.batch_head) * classes.batch + (tile.q_head + head) * classes.head;
  }

  /// mask::kSeen and others of a block.
  FLASH_ATTN_DEVICE uint32_t classes_of(int block) const {
    const TileClasses& classes = params.extended.classes;
    return classes.data == nullptr ? mask::kSeen | (params.extended.has_bias ? mask::kBiased : 0) : classes.data[block];
  }

  /// How many tiles add to a block before this one, see tiles_before() of dq/turns.h.
  FLASH_ATTN_DEVICE int turns_before(const Tile& tile, int head, int m_block) const {
    const int own = tile.n_begin / kBlockN, row = m_block * kBlockM;
    int begin, end;
    if (!params.schedule.falling || block_step<Config>(tile) < 0) {
      begin = tile.band().first_column(row) / kBlockN;
      end = own;
    } else {
      begin = own + 1;
      end = tile.band().last_column(min(row + kBlockM, tile.seqlen_q) - 1) / kBlockN + 1;
    }
    const TileClasses& classes = params.extended.classes;
    if (classes.data == nullptr) return end - begin;
    const uint8_t* const of_block = classes.data + first_block_of_head(tile, head) + m_block * classes.query_block;
    int count = 0;
#pragma unroll 4
    for (int n = begin; n < end; ++n) count += of_block[n * classes.key_block] & mask::kSeen;
    return count;
  }

  FLASH_ATTN_DEVICE bool is_blind(const Tile& tile, const Step& step) const {
    const int* const of_block = params.extended.blind + block_of_step(params, tile, step) * Config::kWords;
    int blind = of_block[0];
    if constexpr (Config::kWords == 2) blind |= of_block[1];
    return blind != 0;
  }

  /// When its readers are through with what it held before.
  FLASH_ATTN_DEVICE Chunk& next_chunk() const {
    const uint32_t chunk = shared.list.chunk;
    mbarrier_wait(&shared.steps_empty[chunk % kChunks], chunk / kChunks % 2 ^ 1);
    return shared.chunks[chunk % kChunks];
  }

  /// Each lane says so of the step that it has written.
  FLASH_ATTN_DEVICE void publish(int count, bool last) const {
    const int slot = shared.list.chunk % kChunks;
    __syncwarp();
    if (lane_id() == 0) {
      shared.chunks[slot].count = count;
      shared.chunks[slot].last = last;
      ++shared.list.chunk;
    }
    mbarrier_arrive(&shared.steps_full[slot]);
  }

  /// Of the tile's blocks of the list's head, kChunkSteps from number `first` on in its order.
  FLASH_ATTN_DEVICE void list_blocks(const Tile& tile) const {
    const int blocks = tile.m_end - tile.m_begin;
    const int number = kChunkSteps < 32 && lane_id() >= kChunkSteps ? blocks : shared.list.first + lane_id();
    int m_block = tile.m_first + number * block_step<Config>(tile);
    if (m_block >= tile.m_end) m_block -= blocks;
    const int block = first_block_of_head(tile, shared.list.head) +
                      tile.n_begin / kBlockN * params.extended.classes.key_block +
                      m_block * params.extended.classes.query_block;
    const uint32_t found = number < blocks ? classes_of(block) : 0;
    const bool visited = (found & mask::kSeen) != 0;
    const uint32_t all = __ballot_sync(~0u, visited);
    if (all == 0 && !is_last(tile)) return;
    Chunk& chunk = next_chunk();
    if (visited) {
      uint32_t before;
      asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(before));
      Step& step = chunk.steps[__popc(all & before)];
      step.m_block = m_block;
      step.block = block;
      step.head = shared.list.head;
      const bool biased = (found & mask::kBiased) != 0, hidden = !biased && (found & mask::kHidden) != 0;
      step.rules = biased ? kBiased : hidden ? kHidden : kNone;
      step.blind = is_blind(tile, step);
      if (params.is_ordered()) step.before = turns_before(tile, shared.list.head, m_block);
    }
    publish(__popc(all), is_last(tile));
  }

  /// Whether the list's place is the tile's last.
  FLASH_ATTN_DEVICE bool is_last(const Tile& tile) const {
    return shared.list.first + kChunkSteps >= tile.m_end - tile.m_begin && shared.list.head + 1 >= tile.num_heads;
  }

  FLASH_ATTN_DEVICE void list(const Tile& tile) const {
    bool more = true;
    if (lane_id() == 0) shared.list.head = shared.list.first = 0;
    __syncwarp();
#pragma unroll 1
    while (more) {
      list_blocks(tile);
      more = !is_last(tile);
      __syncwarp();
      if (lane_id() == 0) {
        shared.list.first += kChunkSteps;
        if (shared.list.first >= tile.m_end - tile.m_begin) {
          shared.list.first = 0;
          ++shared.list.head;
        }
      }
      __syncwarp();
    }
  }
};

}  // namespace flash_attn::cuda::sm90::backward::extended
