// Sizes of tiles, and who owns what in them.
//
// A tile is kBlockM packed rows of one head of keys: packed row r is query row r / group of query head r % group of
// those that read the head, so that keys and values are read once for all of them. It goes over the keys in blocks of
// kBlockN. Warp (m, n, c) of kWarpsM x kWarpsN x kParts has 16 of the rows, kBlockN / kWarpsN keys of each block, and
// one of kParts of the columns of O; those that differ in c alone compute the same scores. It keeps a
// softmax of its own over the keys that it sees; what the kWarpsN warps of a row have is put together at the end alone,
// 8 rows of each 16 at a time, in the stage whose keys were the tile's last.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "../../common/ptx.h"
#include "../../sm80/shared_tile.h"
#include "../stages/copies.h"

namespace flash_attn::cuda::decode {

/// Of a stage of about 32 KB.
constexpr int block_keys(int head_dim, int block_m, int stored_bytes) {
  return (head_dim <= 64 ? 128 : block_m == 64 && head_dim > 128 ? 32 : 64) * (stored_bytes == 1 ? 2 : 1);
}

/// A tile of keys or values, row by row.
template <int kColumns>
struct RowTile : sm80::SharedTile<kColumns> {
  static constexpr int kPitch = kColumns * 2;  // bytes from a row to the next
  /// From the address of a chunk to that of the one `chunks` further in its row, a multiple of a lane's group.
  FLASH_ATTN_DEVICE static uint32_t further(uint32_t address, int chunks) { return address + chunks * 16; }
};

/// Element is q's and out's type, Stored that of keys and values, Operand what is multiplied.
template <typename Element_, typename Stored_, int kHeadDim_, int kBlockM_, int kBlocksPerSm_>
struct Config : Copies<RowTile<kHeadDim_* int(sizeof(Stored_)) / 2>, block_keys(kHeadDim_, kBlockM_, sizeof(Stored_)),
                       int(sizeof(Stored_)), 1> {
  using Element = Element_;
  using Stored = Stored_;
  static constexpr bool kFloat8 = sizeof(Stored) == 1;
  using Operand = std::conditional_t<kFloat8, __half, Element>;
  using Tile = RowTile<kHeadDim_* int(sizeof(Stored)) / 2>;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDim;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kBlockN = block_keys(kHeadDim, kBlockM, sizeof(Stored));
  static constexpr int kWarpsM = kBlockM / 16;
  static constexpr int kParts = kHeadDim > 128 ? 2 : 1;
  static constexpr int kWarpsN = kBlockM == 16 ? 4 : 2 / (kWarpsM * kParts == 8 ? 2 : 1);
  static constexpr int kConsumers = 32 * kWarpsM * kWarpsN * kParts;  // threads that compute
  static constexpr bool kValues = true;                               // are copied apart from keys
  static constexpr int kLoaders = 2;                                  // warps
  static constexpr int kThreads = kConsumers + 32 * kLoaders;
  static constexpr int kLoaderRegisters = 0;  // all threads have as many
  static constexpr int kColumns = kHeadDim / kParts;
  static constexpr int kWarpKeys = kBlockN / kWarpsN;
  static constexpr int kStepKeys = kWarpKeys < 32 ? kWarpKeys : 32;  // that a warp works on at once
  static constexpr int kTileBytes = kBlockN * Tile::kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys and values of a block
  static constexpr int kAlignment = 128;              // of stages
  static constexpr bool kQueriesInShared = kHeadDim * (kBlockM > 16 || kFloat8 ? 2 : 1) > 128;  // registers are few
  static constexpr int kQueryBytes = kQueriesInShared ? kBlockM * kHeadDim * 2 : 0;
  static constexpr int kMergeStages = kWarpsN > 1 ? 1 : 0;  // in which the warps' sums come together
  static_assert(kWarpKeys % 16 == 0 && kColumns % (kFloat8 ? 32 : 16) == 0);

  // The warps' sums, in a stage.
  static constexpr int kPassRows = 8 * kWarpsM, kPasses = 2;
  static constexpr int kPadded = kHeadDim + 8;  // rows that are 8 banks apart
  static constexpr int kPitch = kWarpsN * kPassRows * kPadded * 4 <= kStageBytes ? kPadded : kHeadDim;  // floats
  static_assert(kWarpsN * kPassRows * kPitch * 4 <= kStageBytes);
  static constexpr int kStatisticsBytes = kWarpsN * kBlockM * 8;  // row_max and row_sum of each warp, beside the stages
};

/// What a warp has.
template <typename C>
struct WarpPlace {
  int first_row, first_key, part;  // first_row: the first of this lane's two, which are 8 apart
  int m, n;

  SM80_DEVICE WarpPlace() {
    const int warp = int(threadIdx.x) / 32;
    m = warp % C::kWarpsM;
    first_row = 16 * m + int(threadIdx.x) % 32 / 4;
    n = warp / C::kWarpsM % C::kWarpsN;
    first_key = n * C::kWarpKeys;
    part = warp / (C::kWarpsM * C::kWarpsN);
  }
};

}  // namespace flash_attn::cuda::decode
