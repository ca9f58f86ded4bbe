// Sizes where values are the first kHeadDimV columns of the keys, as all heads of latent attention read them
// (DeepSeek-V2, 2024): each row of the cache is copied once.
//
// 64 packed rows have 512 columns of O, which no warpgroup has registers for: each of two warpgroups has half of them,
// and the scores of every other block (latent/pair.h).
#pragma once

#include "../warpgroups/config.h"

namespace flash_attn::cuda::decode {

template <typename Element_>
struct LatentConfig : Copies<PanelTile<32, 576>, 32, 2, 4> {
  using Element = Element_;
  using Stored = Element;
  using Tile = PanelTile<32, 576>;
  static constexpr bool kFloat8 = false;
  static constexpr int kHeadDim = 576, kHeadDimV = 512;
  static constexpr int kBlockM = 64, kBlockN = 32, kStepKeys = kBlockN;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kConsumers = 256;
  static constexpr int kLoaders = LatentConfig::kLoadersPerTile;
  static constexpr bool kValues = false;  // keys are copied alone
  static constexpr int kThreads = kConsumers + 32 * kLoaders;
  static constexpr int kConsumerRegisters = 208, kLoaderRegisters = 88;
  static constexpr int kTileBytes = Tile::kBytes, kStageBytes = kTileBytes;
  static constexpr int kMergeStages = 0;
  static constexpr int kAlignment = 1024;
  static constexpr bool kQueriesInShared = true;
  static constexpr int kQueryBytes = PanelTile<kBlockM, kHeadDim>::kBytes;
  static constexpr int kStatisticsBytes = 2 * 128 * (kBlockN + 8) + 16;  // what the warpgroups tell each other
};

}  // namespace flash_attn::cuda::decode
