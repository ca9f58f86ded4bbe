// Sizes of tiles, and who owns what in them.
//
// A tile is kBlockM packed rows of one head of keys: packed row r is query row r / group of query head r % group of
// those that read the head, so that keys and values are read once for all of them. It goes over the keys in blocks of
// kBlockN. Warp (m, n, c) of kWarpsM x kWarpsN x kParts has 16 of the rows, kBlockN / kWarpsN keys of each block, and
// one of kParts of the columns of O; those that differ in c alone compute the same scores. It keeps a softmax of its
// own over the keys that it sees; what the kWarpsN warps of a row have is put together at the end alone.
#pragma once

#include "../sm80/shared_tile.h"

namespace flash_attn::cuda::decode {

template <typename Element_, int kHeadDim_, int kBlockM_, int kBlocksPerSm_>
struct Config {
  using Element = Element_;
  using Tile = sm80::SharedTile<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kBlockN = kBlockM == 16 || kHeadDim <= 128 ? 64 : 32;
  static constexpr int kWarpsM = kBlockM / 16;
  static constexpr int kParts = kHeadDim > 128 ? 2 : 1;
  static constexpr int kWarpsN = kBlockM == 16 ? 4 : 2 / kParts;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN * kParts;
  static constexpr int kColumns = kHeadDim / kParts;
  static constexpr int kWarpKeys = kBlockN / kWarpsN;
  static constexpr int kTileBytes = kBlockN * Tile::kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;                  // keys and values of a block
  static constexpr int kSumBytes = kBlockM * kHeadDim * 4;            // O, as the warps of a row add to it
  static constexpr int kStatisticsBytes = kWarpsN * kBlockM * 2 * 4;  // row_max and row_sum of each warp
  static constexpr bool kQueriesInShared = kHeadDim > 192;            // there are no registers for them
  static constexpr int kQueryBytes = kQueriesInShared ? kBlockM * kHeadDim * 2 : 0;
  static_assert(kWarpKeys % 16 == 0 && kColumns % 16 == 0);

  // A thread copies one 16-byte chunk of each kGroup, of every kRowStep-th row.
  static constexpr int kChunks = Tile::kChunks;
  static constexpr int kPower = kChunks & -kChunks;  // the largest power of 2 that divides a row's chunks
  static constexpr int kGroup = kPower < kThreads / 8 ? kPower : kThreads / 8;
  static constexpr int kRowStep = kThreads / kGroup;
  static constexpr int kSteps = kBlockN / kRowStep;
  static_assert(kBlockN % kRowStep == 0 && kRowStep % 8 == 0);
};

/// What a warp has.
template <typename C>
struct WarpPlace {
  int first_row, first_key, part;  // first_row: the first of this lane's two, which are 8 apart
  int n;

  SM80_DEVICE WarpPlace() {
    const int warp = int(threadIdx.x) / 32;
    first_row = 16 * (warp % C::kWarpsM) + int(threadIdx.x) % 32 / 4;
    n = warp / C::kWarpsM % C::kWarpsN;
    first_key = n * C::kWarpKeys;
    part = warp / (C::kWarpsM * C::kWarpsN);
  }
};

}  // namespace flash_attn::cuda::decode
