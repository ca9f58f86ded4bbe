// What one backward kernel of the family is made of.
//
// A block owns kBlockN keys of one KV head and walks over the blocks of kBlockM query rows that see them. Its warps
// form kWarpsN x kWarpsQ. Warp (n, q) has 16 kKeyTiles keys of its own, and of them
//   S^T, dP^T   (keys, the q-th share of the block's query rows)
//   dK, dV      (keys, the q-th share of the columns), in registers throughout
// so P^T and dS^T of its own rows, as accumulated, are A operands of dV += P^T dO and dK += dS^T Q; those of the other
// kWarpsQ - 1 shares come from shared memory. dQ = dS K has the keys as its inner dimension: its A operand is what all
// warps have stored, read transposed, and the warps share out its rows and columns.
//
// Shared memory delivers 128 bytes a clock, in which the tensor cores of an H200's SM take 77 bytes of an operand:
// every fragment has to serve two products. Hence 32 keys a warp where registers allow.
#pragma once

#include "../code.h"
#include "../rules.h"
#include "../shared_tile.h"

namespace flash_attn::cuda::sm80 {

template <typename Element_, int kHeadDim_, int kBlockN_, int kBlockM_, int kKeyTiles_, int kWarpsQ_, int kStages_,
          int kBlocksPerSm_, Rules kRules_, unsigned kGpus>
struct BackwardConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // of q and k, and of v: what is smaller is filled with zeros
  static constexpr int kBlockN = kBlockN_, kBlockM = kBlockM_;
  static constexpr int kKeyTiles = kKeyTiles_, kWarpKeys = 16 * kKeyTiles;
  static constexpr int kWarpsN = kBlockN / kWarpKeys, kWarpsQ = kWarpsQ_, kWarps = kWarpsN * kWarpsQ;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = kStages_;  // of Q and dO
  // Where ptxas takes more registers: what can be computed again is.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 10
  static constexpr bool kFewRegisters = true;
#else
  static constexpr bool kFewRegisters = kRules_ == Rules::kDropout && kStages == 1;
#endif
  static constexpr bool kSpareRegister = !kFewRegisters && (kRules_ == Rules::kPlain || kRules_ == Rules::kDropout);
  // Q and dO of a step have one barrier [320 instead of 313 TFLOP/s at head dim 128, H200]; with one stage each is
  // loaded anew as soon as it has been used.
  static constexpr bool kTogether = kStages > 1 && !kFewRegisters && kRules_ != Rules::kExtended;
  // The next step's copies are issued among the products of dV and dK [1.01 to 1.04 at 8,192 rows; with a bias 0.96 to
  // 0.98, H200].
  static constexpr bool kSpreadsCopies = kTogether && kRules_ != Rules::kBias;
  // In a fixed order, turns are passed on between dP and S: in a tile of more query rows than keys two blocks add to
  // the same rows in each step, one behind the other, and have to be done with it in half a step each. At head dim 64
  // what ptxas makes of it is faster in any order too [1.006 to 1.016; at 128 0.99, H200].
  static constexpr bool kEarlyTurns = kStages == 1 || (kHeadDim == 64 && kSpareRegister);
  static constexpr int kBlocksPerSm = kBlocksPerSm_;  // that registers are bounded for
  static constexpr Rules kRules = kRules_;
  static constexpr bool kExtended = kRules == Rules::kExtended, kBias = kRules == Rules::kBias,
                        kMasks = kExtended || kBias || kRules == Rules::kMask,
                        kDrops = kExtended || kRules == Rules::kDropout;

  static constexpr int kWarpQueries = kBlockM / kWarpsQ, kQueryTiles = kWarpQueries / 8;    // of S^T, dP^T
  static constexpr int kWarpColumns = kHeadDim / kWarpsQ, kColumnTiles = kWarpColumns / 8;  // of dK, dV

  // dQ: kDqWarpsM x kDqWarpsD warps, with 32 rows each unless that leaves them no whole pairs of column tiles.
  static constexpr int dq_warps_m() {
    for (int m = kBlockM >= 32 ? kBlockM / 32 : 1; m <= kWarps && m <= kBlockM / 16; m *= 2) {
      if (kWarps % m == 0 && kHeadDim % (kWarps / m * 16) == 0) return m;
    }
    return 0;
  }
  static constexpr int kDqWarpsM = dq_warps_m(), kDqWarpsD = kWarps / kDqWarpsM;
  static constexpr int kDqRowTiles = kBlockM / 16 / kDqWarpsM, kAllDqColumnTiles = kHeadDim / 8 / kDqWarpsD;
  // Where registers do not hold all of it beside dK and dV, in two passes.
  static constexpr int kDqPasses = 8 * kKeyTiles * kColumnTiles + 4 * kDqRowTiles * kAllDqColumnTiles > 200 ? 2 : 1;
  static constexpr int kDqColumnTiles = kAllDqColumnTiles / kDqPasses;

  // Shared memory, in bytes from its start.
  static constexpr int kKeyBytes = kBlockN * kHeadDim * 2, kQueryBytes = kBlockM * kHeadDim * 2;
  static constexpr int kScoreBytes = kBlockN * kBlockM * 2;  // (keys, queries)
  static constexpr int kStatisticBytes = kBlockM * 4;
  static constexpr int kK = 0, kV = kK + kKeyBytes, kQ = kV + kKeyBytes, kDo = kQ + kStages * kQueryBytes;
  static constexpr int kDs = kDo + kStages * kQueryBytes, kP = kDs + kScoreBytes;
  static constexpr int kLse = kP + (kWarpsQ > 1 ? kScoreBytes : 0), kDelta = kLse + kStages * kStatisticBytes;
  static constexpr int kBarriers = kDelta + kStages * kStatisticBytes;
  static constexpr int kNumBarriers = 4 * kStages + (kBias ? 3 : 2);
  static constexpr int kTile = (kBarriers + 8 * kNumBarriers + 15) / 16 * 16, kTileBytes = 256;
  static constexpr int kAddedTurns = kTile + kTileBytes, kSlopeSums = kAddedTurns + 8 * kWarps;
  static constexpr int kSharedBytes = kSlopeSums + (kExtended ? 4 * kWarps : 0);

#ifdef __CUDA_ARCH__
  static constexpr bool kHasCode = (kGpus & gpus_of_code(__CUDA_ARCH__)) != 0;
#else
  static constexpr bool kHasCode = true;
#endif

  static_assert(kBlockN % kWarpKeys == 0 && kBlockM % (16 * kWarpsQ) == 0 && kHeadDim % (16 * kWarpsQ) == 0);
  static_assert(!kBias || (kWarpKeys == 32 && kWarpQueries % 32 == 0 && kStages > 1), "P makes room for biases");
  static_assert(kDqWarpsM > 0 && kDqRowTiles * 16 * kDqWarpsM == kBlockM, "dQ has to be shared out evenly");
};

}  // namespace flash_attn::cuda::sm80
