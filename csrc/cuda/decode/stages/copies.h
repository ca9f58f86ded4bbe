// Which warp copies what of a block.
#pragma once

namespace flash_attn::cuda::decode {

/// kWarps warps copy each tile of a block, keys or values, kRowStep rows at a time, a lane a 16-byte chunk of each
/// kGroup.
template <typename Tile_, int kBlockN, int kElementBytes, int kWarps>
struct Copies {
  static constexpr int kLoadersPerTile = kWarps;
  static constexpr int kChunks = Tile_::kChunks;
  static constexpr int kChunkColumns = 16 / kElementBytes;
  static constexpr int kPower = kChunks & -kChunks;  // the largest power of 2 that divides a row's chunks
  static constexpr int kGroup = kPower < 32 ? kPower : 32;
  static constexpr int kWarpRows = 32 / kGroup, kRowStep = kWarpRows * kWarps;
  static constexpr int kRun = 16;  // rows that lie in one page, where pages have a multiple of as many
  static_assert(kRun % kRowStep == 0 && kBlockN % kRun == 0 && kBlockN / kRun <= 32);
};

}  // namespace flash_attn::cuda::decode
