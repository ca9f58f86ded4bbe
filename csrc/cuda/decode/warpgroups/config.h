// Sizes of the tiles that a warpgroup of Hopper multiplies: 64 packed rows (warps/config.h says which), of which each
// of its four warps has 16 with all their keys and columns, so that nothing has to be put together in a CTA.
#pragma once

#include "../../sm90/hopper/wgmma.h"
#include "../stages/copies.h"

namespace flash_attn::cuda::decode {

/// A tile in panels of 64 columns, as sm90/hopper/wgmma.h says. The last one may have fewer that are used.
template <int kRows, int kColumns>
struct PanelTile {
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kPanelBytes = kRows * 128, kBytes = (kColumns + 63) / 64 * kPanelBytes;
  static constexpr int kPitch = 128;  // bytes from a row to the next
  static constexpr bool kWholeLines = true;

  /// Bytes from the tile's start.
  FLASH_ATTN_DEVICE static uint32_t offset(int row, int chunk) {
    return uint32_t(chunk / 8 * kPanelBytes + row * kPitch + ((chunk % 8 ^ row % 8) << 4));
  }
  /// From the address of a chunk to that of the one `chunks` further in its row, a multiple of a lane's group.
  FLASH_ATTN_DEVICE static uint32_t further(uint32_t address, int chunks) {
    return (address ^ uint32_t(chunks % 8 << 4)) + chunks / 8 * kPanelBytes;
  }
};

/// Values as keys are of kHeadDim columns.
template <typename Element_, int kHeadDim_, int kBlockN_, int kBlocksPerSm_>
struct WarpgroupConfig
    : Copies<PanelTile<kBlockN_, kHeadDim_>, kBlockN_, 2, kBlocksPerSm_ == 1 ? 2 : 1> {  // one CTA feeds an SM, or two
  using Element = Element_;
  using Stored = Element;
  using Tile = PanelTile<kBlockN_, kHeadDim_>;
  static constexpr bool kFloat8 = false;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDim;
  static constexpr int kBlockM = 64, kBlockN = kBlockN_, kStepKeys = kBlockN;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kConsumers = 128;  // threads that compute
  static constexpr bool kValues = true;   // are copied apart from keys
  static constexpr int kLoaders = 2 * WarpgroupConfig::kLoadersPerTile;
  static constexpr int kThreads = kConsumers + 32 * kLoaders;
  static constexpr int kLoaderRegisters = 0;  // all threads have as many
  static constexpr int kTileBytes = Tile::kBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kMergeStages = 0;
  static constexpr int kAlignment = 1024;
  static constexpr bool kQueriesInShared = kHeadDim > 128;  // registers are few
  static constexpr int kQueryBytes = kQueriesInShared ? PanelTile<kBlockM, kHeadDim>::kBytes : 0;
  static constexpr int kStatisticsBytes = 0;
  static_assert(kHeadDim <= 128 || kBlocksPerSm == 1, "two CTAs leave a thread 168 registers");
};

}  // namespace flash_attn::cuda::decode
