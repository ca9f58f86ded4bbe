// What one forward kernel for float32 is made of.
//
// A block of kWarps warps owns kBlockM = 16 kMTiles kWarps query rows of one head, as the kernels for 16 bits do, and
// walks over tiles of kBlockN keys, of which S is in registers. Tiles in shared memory have the high and the low halves
// of a row side by side, so they look like those of twice the head dimension.
//
// The tensor core rounds toward zero, so that a long sum inside of it shrinks. O, and a total of S, are ordinary float
// sums: of P V over the keys of one tile, of Q K^T over 16 kSumSteps columns.
#pragma once

#include "../code.h"
#include "../products.h"

namespace flash_attn::cuda::sm80::fp32 {

template <int kHeadDim_, int kWarps_, int kMTiles_, int kBlockN_, int kSumSteps_, int kBlocksPerSm_, bool kExtended_,
          typename Products_ = MmaProducts<false>>
struct ForwardConfig {
  static constexpr int kHeadDim = kHeadDim_;  // of q and k, and of v: what is smaller is filled with zeros
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kMTiles = kMTiles_, kWarpRows = 16 * kMTiles, kBlockM = kWarpRows * kWarps;
  static constexpr int kBlockN = kBlockN_, kNTiles = kBlockN / 8;
  static constexpr int kSumSteps = kSumSteps_;
  static constexpr int kDTiles = kHeadDim / 8;            // of O
  static constexpr int kBlocksPerSm = kBlocksPerSm_;      // that registers are bounded for
  static constexpr bool kExtended = kExtended_;           // softcap, ALiBi, masks, dropout
  static constexpr int kAhead = kHeadDim == 128 ? 2 : 1;  // panels of 64 columns that are computed at a time
  using Products = Products_;
  // Of a row of a tile that are loaded: both halves, or the high ones.
  static constexpr int kLoaded = Products::kReduced ? kHeadDim : 2 * kHeadDim;
  using QueryTile = typename Products::template Tile<kBlockM, 2 * kHeadDim>;
  using KeyTile = typename Products::template Tile<kBlockN, 2 * kHeadDim>;
  static constexpr int kRowBytes = 2 * kHeadDim * 2;
  static constexpr int kQueryBytes = kBlockM * kRowBytes, kSlotBytes = kBlockN * kRowBytes;
#ifdef __CUDA_ARCH__
  static constexpr bool kHasCode = has_code(__CUDA_ARCH__);
#else
  static constexpr bool kHasCode = true;
#endif
  static_assert(kBlockN % 16 == 0 && 64 % kBlockN == 0 && 64 % kWarpRows == 0, "a power of two is that of 64 rows");
  static_assert(kHeadDim % 16 == 0);
};

}  // namespace flash_attn::cuda::sm80::fp32
