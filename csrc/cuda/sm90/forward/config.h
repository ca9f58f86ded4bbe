// What a forward kernel is compiled for, and the shared memory that follows from it.
#pragma once

#include <type_traits>

#include "../../common/scores/softmax.h"
#include "../hopper/budgets.h"
#include "../hopper/ring.h"
#include "../hopper/wgmma.h"
#include "params.h"
#include "tile.h"

namespace flash_attn::cuda::sm90::forward {

/// How a kernel cuts the problem. A kernel's shape derives from this and overrides.
struct Shape {
  static constexpr int kHeadDim = 128, kHeadDimV = 128;  // smaller ones are filled up with zeros
  static constexpr int kConsumers = 2;                   // warpgroups of 64 query rows each
  static constexpr int kBlockN = 128;
  static constexpr int kStagesQ = 2, kStagesKV = 2;  // Q: 1 or 2
  // Take the row maximum of a tile's first block for the whole tile while no sum overflows: see OnlineSoftmax.
  static constexpr bool kLazyMax = false;
  // Write out through a buffer of its own, 4 KB a warp, instead of through Q's. A single Q stage needs it.
  static constexpr bool kOutBuffer = false;
  static constexpr bool kBand = false;  // what rows see is found on the device: BandParams
  // The parts of a tile are a cluster's CTAs, which put them together. Each has one tile, and all are split.
  static constexpr bool kCluster = false;
};

template <typename Element_, typename Shape, bool kMasked_>
struct KernelConfig : Shape {
  using Element = Element_;
  static constexpr bool kMasked = kMasked_;  // causal or a window: edge blocks anywhere, else only a sequence's last
  using Params = std::conditional_t<Shape::kBand, BandParams, KernelParams>;
  using TileType = Tile;
  using Softmax = OnlineSoftmax<Shape::kBlockN>;

  static constexpr int kBlockM = 64 * Shape::kConsumers;
  static constexpr int kThreads = 128 * (Shape::kConsumers + 1);
  static constexpr int kPanels = (Shape::kHeadDim + 63) / 64, kPanelsV = (Shape::kHeadDimV + 63) / 64;
  static constexpr int kPanelBytesQ = kBlockM * 128, kPanelBytesKV = Shape::kBlockN * 128;
  static constexpr int kBytesQ = kPanels * kPanelBytesQ;
  static constexpr int kBytesK = kPanels * kPanelBytesKV, kBytesV = kPanelsV * kPanelBytesKV;
  static constexpr int kOutPanels = Shape::kOutBuffer ? 2 : kPanelsV;  // that a warp stages at once
  static constexpr int kPanelBytesOut = Shape::kOutBuffer ? 16 * 128 : kPanelBytesQ;

  // The scheduler writes tile t + 1 when tile t has got its Q buffer. So all consumers have released the Q of tile
  // t - kStagesQ, are at most in its epilogue, and are through with tile t - kStagesQ - 1, whose slot t + 1 may take.
  static constexpr int kTileSlots = 4;

  static constexpr int kSchedulerThreads = 1;  // that write a tile

  // Of a part: O of a warp's 16 rows.
  static constexpr int kWarpBytesOfPart = 16 * Shape::kHeadDimV * 4;

  // A CTA starts with 65,536 / kThreads registers a thread; setmaxnreg moves them from producer to consumers.
  static constexpr int kProducerRegisters = Shape::kConsumers == 2 ? 56 : 32;
  static constexpr int kConsumerRegisters = Shape::kConsumers == 4 ? 112 : Shape::kConsumers == 3 ? 160 : 224;

  static_assert(Shape::kConsumers >= 2 && Shape::kConsumers <= 4, "the register budgets cover two to four");
  static_assert(Shape::kStagesQ <= kTileSlots - 2, "see kTileSlots");
  static_assert(Shape::kBlockN % 16 == 0, "P V advances by 16 rows of V");
  static_assert(Shape::kOutBuffer || (Shape::kStagesQ > 1 && kPanelsV <= kPanels),
                "out goes through Q's buffer only while the next Q has another");
};

template <typename Config>
struct SharedStorage {
  alignas(1024) uint8_t q[Config::kStagesQ][Config::kBytesQ];                        // [panel][kBlockM][64]
  alignas(1024) uint8_t k[Config::kStagesKV][Config::kBytesK];                       // [panel][kBlockN][64]
  alignas(1024) uint8_t v[Config::kStagesKV][Config::kBytesV];                       // [panel][kBlockN][64]
  alignas(1024) uint8_t out[Config::kOutBuffer ? 4 * Config::kConsumers : 0][4096];  // [warp][2 panels][16][64]

  // full: the producer's copy has arrived. empty: all consumers (Q: all their warps) have read it for the last time.
  alignas(8) uint64_t q_full[Config::kStagesQ], q_empty[Config::kStagesQ];
  uint64_t k_full[Config::kStagesKV], k_empty[Config::kStagesKV];
  uint64_t v_full[Config::kStagesKV], v_empty[Config::kStagesKV];

  // ready: the scheduler has written the next tile. wanted: the producer will soon be through with that one.
  uint64_t tile_ready, tile_wanted;
  typename Config::TileType tiles[Config::kTileSlots];
};

/// Parts come into the stages of K and V, which are free by then. A slot has what one CTA of the cluster sends of one
/// warp's rows.
template <typename Config>
struct ClusterStorage : SharedStorage<Config> {
  float2 statistics[kPartSlots][16];  // row_max, row_sum
  // ready: K and V of all other CTAs have been read. full: all have sent of the warp's rows.
  uint64_t peers_ready, parts_full[4 * Config::kConsumers];
  /// O in the order of fragments: [4 floats of a thread][lane].
  FLASH_ATTN_DEVICE float* part(int slot) const {
    return reinterpret_cast<float*>(const_cast<uint8_t*>(&this->k[0][0]) + slot * Config::kWarpBytesOfPart);
  }
  static_assert(Config::kConsumers == 2, "see kPartSlots");
  static_assert(Config::kStagesKV * (Config::kBytesK + Config::kBytesV) >= kPartSlots * Config::kWarpBytesOfPart,
                "v follows k");
};

/// What a kernel has in shared memory.
template <typename Config>
using StorageOf = std::conditional_t<Config::kCluster, ClusterStorage<Config>, SharedStorage<Config>>;

/// Named barriers; 0 is __syncthreads.
enum Barrier : int {
  kIssue = 1,  // + consumer: whose turn it is to issue matrix products
  kVote = 5,   // + consumer: the vote of OnlineSoftmax::advance_lazily
  kParts = 9,  // all consumers have read K and V for the last time
};

/// Place in the ring of tiles and of Q buffers.
template <typename Config>
struct TileRing {
  uint32_t count = 0;  // of this CTA's tiles so far
  FLASH_ATTN_DEVICE int slot() const { return count % Config::kTileSlots; }
  FLASH_ATTN_DEVICE int stage() const { return count % Config::kStagesQ; }
  FLASH_ATTN_DEVICE uint32_t phase() const { return count / Config::kStagesQ % 2; }
  FLASH_ATTN_DEVICE uint32_t tile_phase() const { return count % 2; }
};

}  // namespace flash_attn::cuda::sm90::forward
