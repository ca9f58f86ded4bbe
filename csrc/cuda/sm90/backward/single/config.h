// What a backward kernel is compiled for, and the shared memory that follows from it.
#pragma once

#include "../../hopper/ring.h"
#include "../dq/turns.h"
#include "../preprocess/prepared_rows.h"
#include "../tiles.h"

namespace flash_attn::cuda::sm90::backward::single {

/// How a kernel cuts the problem. A kernel's shape derives from this and overrides.
struct Shape {
  static constexpr int kHeadDim = 128;  // smaller ones are filled up with zeros
  static constexpr int kBlockM = 64;    // query rows of a step
  static constexpr int kStages = 2;     // of Q and dO
  static constexpr int kStagesKV = 1;   // 2: the next tile's K and V are there when a tile ends
  static constexpr DqPath kDqPath =
      DqPath::kWarp;                    // kOneCta: dense problems alone in which every row sees the first key
  static constexpr bool kBand = false;  // rows see the band of KernelParams::condition
};

/// kRowParts: a tile has a part of a head's query rows, and stores of its part of dk and dv also what rounding to 16
/// bits leaves of them, so that their sums are as exact as without parts. Kernels of their own: with both in one the
/// others take longer (benchmarks/experiments/052).
template <typename Element_, typename Shape, bool kRowParts_ = false>
struct KernelConfig : Shape {
  using Element = Element_;
  static constexpr bool kRowParts = kRowParts_;
  static constexpr bool kExtended = false;  // extended/: tiles neither prepare rows nor write dq
  static constexpr int kCtas = 1;           // that share a tile
  static constexpr int kConsumers = 2;      // warpgroups of 64 key rows each
  static constexpr int kBlockN = 64 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kPanels = (Shape::kHeadDim + 63) / 64;
  static constexpr int kPanelBytesQ = Shape::kBlockM * 128, kPanelBytesKV = kBlockN * 128;
  static constexpr int kBytesQ = kPanels * kPanelBytesQ, kBytesKV = kPanels * kPanelBytesKV;
  static constexpr int kBytesStatistics = Shape::kBlockM * kStatisticBytes;

  // dK of a step stays in flight into the next one where registers allow dS to live that long.
  static constexpr bool kDkInFlight = Shape::kBlockM == 64;

  // In a fixed order, tiles may go through their query blocks from the last to the first. Not at head dim 64, where
  // the loop has no uniform register left for it: benchmarks/experiments/073.
  static constexpr bool kDescends = Shape::kBlockM < kBlockN;

  static constexpr int kTileSlots = 2;
  // Threads that read a tile, each of which says when it is through: the producer, the consumers, the dq writer's or
  // a second dQ warp, and the first dQ warp or follow_dq's one thread.
  static constexpr int kTileReaders =
      1 + 128 * kConsumers + (Shape::kDqPath == DqPath::kOneCta ? 0 : 32 + (Shape::kDqPath == DqPath::kWarp ? 32 : 1));

  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  // Each warpgroup computes one 64 x 64 tile of dQ, whose columns are whole panels: a panel, or half of the rows.
  static_assert(Shape::kBlockM * 64 * kPanels == kConsumers * kDqTile, "a warpgroup computes 64 x 64 of dQ");
};

/// The small things come first: they fill a kilobyte or two before buffers that have to start on one, and what
/// compute-sanitizer takes for the extent of an operand without swizzle stays inside.
template <typename Config>
struct SharedStorage {
  // full: the producer's copy has arrived. empty: all consumers (K and V: all their warps, when dK and dV have left
  // through K's and V's buffers) have read it for the last time.
  alignas(1024) uint64_t k_full[Config::kStagesKV];
  uint64_t v_full[Config::kStagesKV], kv_empty[Config::kStagesKV];
  uint64_t q_full[Config::kStages], q_empty[Config::kStages];
  uint64_t dout_full[Config::kStages], dout_empty[Config::kStages];
  uint64_t dq_empty[Config::kConsumers];  // the dQ warp's copy has been read
  DqTurns dq_turns;
  uint64_t dq_added[Config::kTileSlots];  // consumers have added all of a tile's dQ themselves

  // full: the dq writer's copy has arrived, or has chosen a share for the consumers, who have written it: empty.
  uint64_t piece_full[2], share_full, share_empty;
  DqShare share;

  // full: consumers have computed delta of all rows that a tile prepares. empty: the scheduler's warp has read them.
  uint64_t deltas_full, deltas_empty;
  QueryShare prepared_share;  // that the tile prepares
  PreparedBlock prepared;

  uint64_t tile_full[Config::kTileSlots], tile_empty[Config::kTileSlots];
  uint64_t tile_wanted;  // the producer has issued all copies of a tile
  Tile tiles[Config::kTileSlots];

  alignas(128) StatisticOperand weights;
  alignas(128) uint8_t statistics[Config::kStages][Config::kBytesStatistics];

  alignas(1024) uint8_t k[Config::kStagesKV][Config::kBytesKV];            // [panel][kBlockN][64]
  alignas(1024) uint8_t v[Config::kStagesKV][Config::kBytesKV];            // [panel][kBlockN][64]
  alignas(1024) uint8_t q[Config::kStages][Config::kBytesQ];               // [panel][kBlockM][64]
  alignas(1024) uint8_t dout[Config::kStages][Config::kBytesQ];            // [panel][kBlockM][64]
  alignas(1024) uint8_t ds[2][Config::kConsumers * Config::kPanelBytesQ];  // [64 key rows][kBlockM][64]
  alignas(1024) uint8_t dq_rows[Config::kExtended ? 0 : 2][kDqPiece * 2];  // [kDqPieceRows][64], 16-bit
  alignas(128) float dq_piece[Config::kExtended ? 0 : 2][kDqPiece];
  alignas(128) float deltas[Config::kExtended ? 0 : kMaxPreparedRows];
  alignas(128) float dq[Config::kDqPath == DqPath::kWarp ? Config::kConsumers : 0][kDqTile];
};

/// Place in the rings of tiles and of K and V, which advance together: one register for all of a consumer's places.
template <typename Config>
struct TileRing {
  uint32_t count = 0;
  FLASH_ATTN_DEVICE int slot() const { return count % Config::kTileSlots; }
  FLASH_ATTN_DEVICE uint32_t slot_phase() const { return count / Config::kTileSlots % 2; }
  FLASH_ATTN_DEVICE int stage_kv() const { return count % Config::kStagesKV; }
  FLASH_ATTN_DEVICE uint32_t phase_kv() const { return count / Config::kStagesKV % 2; }
};

/// Named barriers; 0 is __syncthreads.
enum Barrier : int {
  kDsReady = 1,  // both consumers have written their half of dS, or have read K for the last time
  kDqReady = 2,  // + consumer: its dQ is in shared memory
};

}  // namespace flash_attn::cuda::sm90::backward::single
