// What an extended forward kernel is compiled for: with attn_mask, boolean or additive, softcap, ALiBi, sinks and
// dropout, each if the problem has it.
#pragma once

#include "../../../../philox.h"
#include "../config.h"
#include "params.h"
#include "softmax.h"
#include "tile.h"

namespace flash_attn::cuda::sm90::forward {

/// How the values of an additive attn_mask come: there are none; by loads to registers, whatever their type and
/// strides; by the copy engine to shared memory (has_mask_map()).
enum class Bias { kNone, kLoaded, kStaged };

template <typename Element_, typename Shape, Bias kBias_, bool kRules_>
struct ExtendedConfig : KernelConfig<Element_, Shape, true> {
  static constexpr Bias kBias = kBias_;
  // Softcap, ALiBi and dropout, each if the problem has it: what is passed over costs time as well, in every block.
  static constexpr bool kRules = kRules_;
  // softcap by CapPolynomial. The code for it costs three consumers with ALiBi more than it saves; other head dims were
  // not measured: benchmarks/experiments/188.
  static constexpr bool kCapPolynomial = kRules_ && kBias_ == Bias::kNone && Shape::kHeadDim == 128;
  static constexpr int kSchedulerThreads = 32;                // each writes some of a tile's list
  static constexpr int kBytesBias = 64 * Shape::kBlockN * 2;  // staged, of a consumer's rows of one block
  // What lists blocks is content with 32 registers; more consumers' registers help where head dims are small, and with
  // larger ones ptxas spills with 232, not with 224.
  static constexpr bool kMoreRegisters = Shape::kConsumers == 2 && Shape::kHeadDim < 128;
  static constexpr int kProducerRegisters =
      kMoreRegisters ? 40 : KernelConfig<Element_, Shape, true>::kProducerRegisters;
  static constexpr int kConsumerRegisters =
      kMoreRegisters ? 232 : KernelConfig<Element_, Shape, true>::kConsumerRegisters;
  using Params = ExtendedParams;
  using TileType = ExtendedTile;
  using Softmax = ScoreSoftmax<Shape::kBlockN>;
  static_assert(Shape::kBlockN % 64 == 0, "a block has whole cells of a packed mask");
  static_assert(!Shape::kLazyMax, "the maximum is one of columns that are seen");
};

template <typename Config>
struct BiasBuffer {
  alignas(1024) uint8_t bias[Config::kConsumers][Config::kBytesBias];  // [consumer][64 columns][64 rows][64]
};
struct NoBiasBuffer {};

template <typename Config>
struct ExtendedStorage : SharedStorage<Config>,
                         std::conditional_t<Config::kBias == Bias::kStaged, BiasBuffer<Config>, NoBiasBuffer> {
  static constexpr int kFreeBytes = kMaxSharedBytes - int(sizeof(SharedStorage<Config>) + sizeof(Dropout)) - 128 -
                                    (Config::kBias == Bias::kStaged ? Config::kConsumers * Config::kBytesBias : 0);
  static constexpr int kFreeBlocks = kFreeBytes / int(Config::kTileSlots * sizeof(VisitedBlock));
  static constexpr int kListCapacity = kFreeBlocks < 512 ? kFreeBlocks : 512;  // a tile that visits more visits all
  static_assert(kListCapacity >= 64);

  // full: the producer's copy has arrived. empty: all warps of the consumer have read it.
  uint64_t bias_full[Config::kConsumers], bias_empty[Config::kConsumers];
  Dropout dropout;
  VisitedBlock lists[Config::kTileSlots][kListCapacity];
  VisitedBlock end;  // so that a place beyond the last list may be read

  /// Number i of the blocks that a tile visits, from right to left. `listed` is the tile's, held by who asks for many.
  FLASH_ATTN_DEVICE VisitedBlock visited(int slot, bool listed, int i) const {
    if (__builtin_expect(listed, 1)) return lists[slot][i];
    const ExtendedTile& tile = this->tiles[slot];
    return tile.whole_block(tile.num_blocks - 1 - i);
  }
};

}  // namespace flash_attn::cuda::sm90::forward
