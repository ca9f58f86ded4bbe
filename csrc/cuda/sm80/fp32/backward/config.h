// What one backward kernel for float32 is made of. One for dK and dV has blocks that own keys and stream query rows,
// one for dQ the other way round. So every sum has one owner, in registers, and a fixed order, and what one warp has of
// P and dS no other needs; for that both kernels compute S and dP, 7 products where 5 would do. Where dK and dV take
// too many registers each has a kernel of its own, that of dV without dP: 8 products. Where the order of sums is free,
// there are kernels of 5 products built on this one: all_gradients.h, and Hopper's.
#pragma once

#include "../code.h"
#include "../products.h"
#include "gradients.h"

namespace flash_attn::cuda::sm80::fp32 {

template <int kHeadDim_, int kWarps_, int kMTiles_, int kBlockN_, int kSumSteps_, int kStages_, int kBlocksPerSm_,
          int kGradients_, bool kExtended_, typename Products_ = MmaProducts<false>>
struct BackwardConfig {
  static constexpr int kHeadDim = kHeadDim_;  // of q and k, and of v: what is smaller is filled with zeros
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kMTiles = kMTiles_, kWarpRows = 16 * kMTiles, kBlockM = kWarpRows * kWarps;  // rows that it owns
  static constexpr int kBlockN = kBlockN_, kNTiles = kBlockN / 8;  // of a streamed tile
  static constexpr int kSumSteps = kSumSteps_;                     // see multiply_rows()
  static constexpr int kStages = kStages_;                         // of streamed tiles
  static constexpr int kBlocksPerSm = kBlocksPerSm_;               // that registers are bounded for
  static constexpr int kGradients = kGradients_;                   // that the kernel computes
  static constexpr bool kOfKeys = kGradients != kDq;               // owns keys; or query rows
  static constexpr bool kWithDx = kGradients != kDv, kWithDy = (kGradients & kDv) != 0;  // of X: dK or dQ; dV
  static constexpr bool kExtended = kExtended_;  // softcap, ALiBi, masks, dropout

  // Panels of 64 columns of a sum of gradients that are computed at a time, where products are asynchronous.
  static constexpr int kAhead = kHeadDim == 128 && !(kWithDx && kWithDy) ? 2 : 1;
  using Products = Products_;
  // Of a row of a tile that are loaded: both halves, or the high ones.
  static constexpr int kLoaded = Products::kReduced ? kHeadDim : 2 * kHeadDim;
  using OwnTile = typename Products::template Tile<kBlockM, 2 * kHeadDim>;
  using OtherTile = typename Products::template Tile<kBlockN, 2 * kHeadDim>;
  static constexpr int kAlignment = Products::kAlignment;

  // Shared memory, in bytes from its start: X (K or Q) and, for dP, Y (V or dO) of the block's rows, then stages of the
  // others'.
  static constexpr int kRowBytes = 2 * kHeadDim * 2;
  static constexpr int kX = 0, kY = kBlockM * kRowBytes, kStreamed = (kWithDx ? 2 : 1) * kBlockM * kRowBytes;
  static constexpr int kTileBytes = kBlockN * kRowBytes, kStatistics = 2 * kTileBytes;
  static constexpr int kStageBytes =
      (kStatistics + (kOfKeys ? 2 * kBlockN * 4 : 0) + kAlignment - 1) / kAlignment * kAlignment;
  static constexpr int kSlack = kAlignment > 128 ? kAlignment : 0;  // to align the start
  static constexpr int kSharedBytes = kStreamed + kStages * kStageBytes + kSlack;
#ifdef __CUDA_ARCH__
  static constexpr bool kHasCode = has_code(__CUDA_ARCH__);
#else
  static constexpr bool kHasCode = true;
#endif
  static_assert(kBlockN % 16 == 0 && 64 % kBlockN == 0 && 64 % kWarpRows == 0, "a power of two is that of 64 rows");
};

}  // namespace flash_attn::cuda::sm80::fp32
