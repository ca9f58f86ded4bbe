// What one backward kernel for float32 is made of: there is one for dK and dV, whose blocks own keys and stream query
// rows, and one for dQ, the other way round. So every sum has one owner, in registers, and a fixed order, and what one
// warp has of P and dS no other needs; for that both kernels compute S and dP, 7 products where 5 would do.
#pragma once

#include <type_traits>

#include "../code.h"
#include "../tiles.h"

namespace flash_attn::cuda::sm80::fp32 {

template <int kHeadDim_, int kWarps_, int kMTiles_, int kBlockN_, int kSumSteps_, int kStages_, int kBlocksPerSm_,
          bool kOfKeys_, bool kExtended_, bool kWgmma_ = false>
struct BackwardConfig {
  static constexpr int kHeadDim = kHeadDim_;  // of q and k, and of v: what is smaller is filled with zeros
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kMTiles = kMTiles_, kWarpRows = 16 * kMTiles, kBlockM = kWarpRows * kWarps;  // rows that it owns
  static constexpr int kBlockN = kBlockN_, kNTiles = kBlockN / 8;  // of a streamed tile
  static constexpr int kSumSteps = kSumSteps_;                     // see multiply_rows()
  static constexpr int kStages = kStages_;                         // of streamed tiles
  static constexpr int kBlocksPerSm = kBlocksPerSm_;               // that registers are bounded for
  static constexpr bool kOfKeys = kOfKeys_;                        // owns keys, for dK and dV; or query rows, for dQ
  static constexpr bool kExtended = kExtended_;                    // softcap, ALiBi, masks, dropout

  static constexpr bool kWgmma = kWgmma_;  // products by warpgroups of four warps
  using OwnTile = std::conditional_t<kWgmma, PanelTile<kBlockM, 2 * kHeadDim>, SharedTile<2 * kHeadDim>>;
  using OtherTile = std::conditional_t<kWgmma, PanelTile<kBlockN, 2 * kHeadDim>, SharedTile<2 * kHeadDim>>;
  static constexpr int kAlignment = kWgmma ? 1024 : 128;  // of tiles

  // Shared memory, in bytes from its start: X (K or Q) and Y (V or dO) of the block's rows, then stages of the others'.
  static constexpr int kRowBytes = 2 * kHeadDim * 2;
  static constexpr int kX = 0, kY = kBlockM * kRowBytes, kStreamed = 2 * kBlockM * kRowBytes;
  static constexpr int kTileBytes = kBlockN * kRowBytes, kStatistics = 2 * kTileBytes;
  static constexpr int kStageBytes =
      (kStatistics + (kOfKeys ? 2 * kBlockN * 4 : 0) + kAlignment - 1) / kAlignment * kAlignment;
  static constexpr int kSharedBytes = kStreamed + kStages * kStageBytes + (kWgmma ? kAlignment : 0);
#ifdef __CUDA_ARCH__
  static constexpr bool kHasCode = has_code(__CUDA_ARCH__);
#else
  static constexpr bool kHasCode = true;
#endif
  static_assert(kBlockN % 16 == 0 && 64 % kBlockN == 0 && 64 % kWarpRows == 0, "a power of two is that of 64 rows");
};

}  // namespace flash_attn::cuda::sm80::fp32
