// What one forward kernel of the family is made of.
//
// A block of kWarps warps owns kBlockM = 16 kMTiles kWarps query rows of one head. Each warp keeps 16 kMTiles of them
// to itself: S, P and O live in its registers, and a fragment of K or V that it reads from shared memory serves kMTiles
// products. Shared memory delivers 128 bytes a clock, and a product of m16n8k16, whose B fragment has 256 bytes, takes
// the four tensor cores of an SM 1.5 clocks [H200]: with one m-tile the kernel is bound by that, with two it is not.
// Head dims whose O (32 rows, a float each) leaves no registers for S have one; or kWarpsD warps have rows in common,
// each with its share of O's columns and of S's keys.
#pragma once

#include "../code.h"
#include "../rules.h"
#include "../shared_tile.h"

namespace flash_attn::cuda::sm80 {

template <typename Element_, int kHeadDim_, int kWarps_, int kMTiles_, int kBlockN_, int kBlocksPerSm_, int kSlots_,
          Rules kRules_, unsigned kGpus, int kWarpsD_ = 1>
struct ForwardConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // of q and k, and of v: what is smaller is filled with zeros
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kWarpsD = kWarpsD_;  // that have the same rows: each other keys of S, and other columns of O
  static constexpr int kMTiles = kMTiles_, kWarpRows = 16 * kMTiles, kBlockM = kWarpRows * (kWarps / kWarpsD);
  static constexpr int kBlockN = kBlockN_;                              // keys of a tile in shared memory
  static constexpr int kSubN = kBlockN / kWarpsD, kNTiles = kSubN / 8;  // keys of S in a warp's registers
  static constexpr int kDTiles = kHeadDim / 8 / kWarpsD;                // of O
  static constexpr int kBlocksPerSm = kBlocksPerSm_;                    // that registers are bounded for
  // Of the ring of tiles of K and V in shared memory.
  static constexpr int kSlots = kSlots_, kSlotBytes = kBlockN * kHeadDim * 2;
  static_assert(kSlots == 2 || kSlots == 3);
  static constexpr Rules kRules = kRules_;
  static constexpr bool kExtended = kRules == Rules::kExtended;
  static constexpr bool kBias = kRules == Rules::kBias, kNatural = kExtended || kBias;  // scores in natural units
  static constexpr bool kKeepsSeen = kBias || kRules == Rules::kMask;  // all words of `seen`, see ForwardKernelParams
  // What a block asks for in every tile is kept in registers where O and S leave some, else read again.
  static constexpr bool kFewRegisters =
      (kRules != Rules::kPlain && (kDTiles >= 32 || kMTiles > 1)) || kNTiles >= 16 || kBlocksPerSm > 2;
  // Where ptxas would spill registers (a thread has 255, or 168 with three blocks), P is packed before V is waited for,
  // which frees S's there. Elsewhere exponentials are taken and packed beside the products, unless dropout draws for
  // all of a tile or P goes through shared memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr bool kTight = kMTiles > 1 && (kDTiles + kNTiles >= 24 || kBlocksPerSm > 2);
#else
  static constexpr bool kTight = false;
#endif
  static constexpr bool kPacks =
      kWarpsD == 1 && !kExtended && (kTight || (kDTiles + kNTiles >= 24 && (kRules == Rules::kDropout || kBias)));
  static constexpr bool kBeside = kWarpsD == 1 && !kExtended && !kPacks;
  // Shared memory, in bytes from its start: Q, the ring; where rows are shared, P, in whose place biases lie until it
  // comes, and a number a row and warp; else biases.
  static constexpr bool kHasP = kWarpsD > 1;
  static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
  static constexpr int kSlotsEnd = kQueryBytes + kSlots * kSlotBytes;
  static constexpr int kP = kSlotsEnd, kBiases = kP;
  static constexpr int kRowValues = kP + (kHasP || kBias ? kBlockM * kBlockN * 2 : 0);
  static constexpr int kTileBytes = kRowValues + (kHasP ? kBlockM * kWarpsD * 4 : 0);

#ifdef __CUDA_ARCH__
  static constexpr bool kHasCode = (kGpus & gpus_of_code(__CUDA_ARCH__)) != 0;
#else
  static constexpr bool kHasCode = true;
#endif

  static_assert(kSubN % 16 == 0 && kHeadDim % 32 == 0 && kDTiles % 2 == 0 && kWarps % kWarpsD == 0);
};

}  // namespace flash_attn::cuda::sm80
