// What a kernel of extended/ is compiled for, and what it has in shared memory beside single/config.h.
#pragma once

#include "../../../../philox.h"
#include "../single/config.h"

namespace flash_attn::cuda::sm90::backward::extended {

/// kTakesBias: an additive attn_mask. Without, its buffer may hold the next tile's K and V.
template <typename Element, typename Shape, bool kTakesBias_>
struct ExtendedConfig : single::KernelConfig<Element, Shape> {
  using Base = single::KernelConfig<Element, Shape>;
  static constexpr bool kExtended = true, kTakesBias = kTakesBias_;
  static constexpr int kBytesStatistics = Shape::kBlockM * 16;  // see RowsParams::extended
  static constexpr int kBytesBias = kTakesBias ? Base::kConsumers * Base::kPanelBytesQ : 0;
  static constexpr int kBytesBits = 4 * Base::kConsumers * (Shape::kBlockM / 64) * 128;
  // With half as many scores a thread as at head dim 64 there are registers to draw dropout's bits for the next step
  // while the products of one end, to load a bias that the copy engine does not reach, to store dmask, and to keep P of
  // all scores until dP is there, whatever the rules.
  static constexpr bool kManyRegisters = Shape::kBlockM == 64;
  static constexpr int kWords = Shape::kBlockM / 64;  // of a bit for each of a thread's scores
  static constexpr int kChunkSteps = 32;              // as many as a warp lists at once
};

/// A query block that a tile visits.
struct Step {
  int m_block, head;  // head: of the tile's
  int rules;          // kHidden, kBiased
  int block;          // its number in TileClasses
  int before;         // with kOrdered: tiles that add to the block before
  bool blind;         // some of its rows see no key at all
};

/// Named barriers, beside single/config.h's.
enum Barrier : int { kWarpgroup = 4 };  // + consumer: its own threads

constexpr int kChunks = 2;

/// Steps of a tile, in their order; see steps.h.
template <int kSteps>
struct StepChunk {
  Step steps[kSteps];
  int count;
  int last;  // the tile's last
};

/// Where the scheduler's warp is in its list.
struct ListPlace {
  uint32_t chunk;   // over all tiles
  int head, first;  // of the tile's; number of the next block of this head
  int tile;         // its index, of which the list is next
};

template <typename Config>
struct SharedStorage : single::SharedStorage<Config> {
  // full: the scheduler's warp has written a chunk. empty: all who walk the tile's steps have read it.
  uint64_t steps_full[kChunks], steps_empty[kChunks];
  uint64_t bias_full, bias_empty;  // as q_full and q_empty, of every warp
  DqTurns dmask_turns;
  Dropout dropout;
  ListPlace list;
  StepChunk<Config::kChunkSteps> chunks[kChunks];
  float slope_sums[128 * Config::kConsumers];                      // a thread's, of the head so far
  alignas(128) uint8_t bits[Config::kStages][Config::kBytesBits];  // [warp][kWords][lane] of 32 bits, see ScoreBits
  alignas(1024) uint8_t bias[Config::kBytesBias];                  // [consumer][kBlockM][64 keys], of 16-bit elements
};

/// Arrivals at steps_empty and at tile_empty: the producer's, the consumers' threads', and of those that bring dQ away
/// or follow dmask.
template <typename Config>
FLASH_ATTN_DEVICE int num_step_readers(const KernelParams& params) {
  return 1 + 128 * Config::kConsumers + (Config::kDqPath == DqPath::kWarp && params.is_ordered() ? 2 : 1) +
         (params.extended.dmask_counters != nullptr ? 1 : 0);
}

}  // namespace flash_attn::cuda::sm90::backward::extended
