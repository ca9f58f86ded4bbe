// What one forward kernel of the family is made of.
//
// A block of kWarps warps owns kBlockM = 16 kMTiles kWarps query rows of one head. Each warp keeps 16 kMTiles of them
// to itself: S, P and O live in its registers, and a fragment of K or V that it reads from shared memory serves kMTiles
// products. Shared memory delivers 128 bytes a clock, and a product of m16n8k16, whose B fragment has 256 bytes, takes
// the four tensor cores of an SM 1.5 clocks [H200]: with one m-tile the kernel is bound by that, with two it is not.
// Head dims whose O (32 rows, a float each) leaves no registers for S have one.
#pragma once

#include "../shared_tile.h"

namespace flash_attn::cuda::sm80 {

template <typename Element_, int kHeadDim_, int kWarps_, int kMTiles_, int kBlockN_, int kSubN_, int kBlocksPerSm_,
          bool kExtended_>
struct ForwardConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // of q and k, and of v: what is smaller is filled with zeros
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kMTiles = kMTiles_, kWarpRows = 16 * kMTiles, kBlockM = kWarpRows * kWarps;
  static constexpr int kBlockN = kBlockN_;                   // keys of a tile in shared memory
  static constexpr int kSubN = kSubN_, kNTiles = kSubN / 8;  // keys of S in registers: half a tile's, or all
  static constexpr int kDTiles = kHeadDim / 8;               // of O
  static constexpr int kBlocksPerSm = kBlocksPerSm_;         // that registers are bounded for
  static constexpr bool kExtended = kExtended_;  // softcap, ALiBi, masks, dropout, or tensors that 16 bytes do not fit
  // What a block asks for in every tile is kept in registers where O and S leave some, else read again from shared
  // memory [336 instead of 347 TFLOP/s at head dim 128, H200].
  static constexpr bool kFewRegisters = kMTiles * (kDTiles + kNTiles) >= 48 || (kExtended && kDTiles >= 32);
  static constexpr int kQueryBytes = kBlockM * kHeadDim * 2, kSlotBytes = kBlockN * kHeadDim * 2;
  static constexpr int kSharedBytes(int slots) { return kQueryBytes + slots * kSlotBytes; }
  static_assert(kSubN % 16 == 0 && (kBlockN == kSubN || kBlockN == 2 * kSubN) && kHeadDim % 32 == 0);
};

}  // namespace flash_attn::cuda::sm80
