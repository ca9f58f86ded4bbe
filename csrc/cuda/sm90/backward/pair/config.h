// What a backward kernel of two CTAs is compiled for, and its shared memory.
#pragma once

#include <type_traits>

#include "../../hopper/budgets.h"
#include "../dq/turns.h"
#include "../preprocess/prepared_rows.h"
#include "../tiles.h"

namespace flash_attn::cuda::sm90::backward::pair {

template <typename Element_, int kHeadDim_, int kHeadDimV_, bool kRowParts_ = false>
struct KernelConfig {
  using Element = Element_;
  static constexpr bool kRowParts = kRowParts_;                       // as in single/config.h
  static constexpr bool kExtended = false;                            // extended_pair/
  static constexpr bool kBand = false;                                // as in single/config.h
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;  // smaller ones are filled up with zeros
  static constexpr int kCtas = 2;
  static constexpr bool kDescends = true;  // as in single/config.h
  static constexpr int kBlockM = 64;
  static constexpr int kRowsN = 64, kBlockN = 2 * kRowsN;  // key rows of a CTA, of the cluster
  static constexpr int kThreads = 384;
  static constexpr int kPanelBytes = 64 * 128;  // every operand has 64 rows
  static constexpr int kPanels = kHeadDim / 64, kPanelsV = kHeadDimV / 64;
  static constexpr int kBytes = kPanels * kPanelBytes, kBytesV = kPanelsV * kPanelBytes;  // of Q or K, of dO or V
  static constexpr int kDqPanels =
      4;  // one each of the pair's four consumers; with a head dimension of 192 one is idle
  static constexpr int kBytesPeer = 2 * kPanelBytes;
  static constexpr int kBytesStatistics = kBlockM * kStatisticBytes;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  /// dS comes of a P that passes from one warpgroup to the other in fp16, which has three bits more than bf16 but a
  /// small range: so P, and with it dV, dS, dQ and dK until they are written, are so many times what they are. Then
  /// fp16 holds probabilities from 2^-26 to 16 in full: benchmarks/experiments/060.
  static constexpr int kProbabilityExponent = std::is_same_v<Element, __nv_bfloat16> ? 12 : 0;
  static constexpr float kProbabilityFactor = 1 << kProbabilityExponent;
  /// With inputs in fp16, a P in fp16 is as coarse as the dS that comes of it; shared memory has room for floats up to
  /// head dimension 192: benchmarks/experiments/060.
  static constexpr bool kPassesFloats = std::is_same_v<Element, __half> && kHeadDim <= 192;
  static constexpr int kBytesP = (kPassesFloats ? 2 : 1) * kPanelBytes;

  static_assert(kPanels == 3 || kPanels == 4, "the pair shares out three or four panels of dQ");
};

template <typename Element, int kHeadDim, int kHeadDimV>
struct BandConfig : KernelConfig<Element, kHeadDim, kHeadDimV> {
  static constexpr bool kBand = true;
};

/// The small things come first, as in SharedStorage.
template <typename Config>
struct SharedStorage {
  // full: has arrived. empty: both warpgroups (p: all threads of one) have read it for the last time.
  alignas(1024) uint64_t k_full;
  uint64_t v_full, q_full[2], q_empty[2], dout_full, dout_empty, p_full[2], p_empty[2];
  uint64_t ds_full[2], ds_peer_full[2];
  DqTurns dq_turns;
  // full: out and dO of a block to prepare have arrived. empty: consumers have written its statistics.
  uint64_t prepared_full, prepared_empty;
  uint64_t ds_free[2];  // dS has been read: by this CTA's scores warpgroup, and by both of the peer from their copy

  Tile tile;

  alignas(128) StatisticOperand weights;
  alignas(128) uint8_t statistics[2][Config::kBytesStatistics];
  uint64_t share_chosen;  // that the tile prepares
  uint64_t all_prepared;  // consumers are through with it
  QueryShare prepared_share;

  alignas(1024) uint8_t k[Config::kBytes], v[Config::kBytesV];  // [panel][64 key rows][64]
  alignas(1024) uint8_t k_peer[Config::kBytesPeer];             // the peer's key rows, this CTA's half of the columns
  alignas(1024) uint8_t q[2][Config::kBytes], dout[Config::kBytesV];                  // [panel][64 query rows][64]
  alignas(1024) uint8_t ds[2][Config::kPanelBytes], ds_peer[2][Config::kPanelBytes];  // [64 query rows][64 key rows]
  alignas(128) uint8_t p[2][Config::kBytesP];                                         // [16 bytes of a thread][128]
};

/// Panels of dO of a block to prepare lie where dS and P are later; out in place of the second step's Q.
template <typename Config>
FLASH_ATTN_DEVICE uint8_t* prepared_dout(SharedStorage<Config>& shared, int panel) {
  return panel < 2 ? shared.ds[panel] : shared.p[panel - 2];
}

enum Barrier : int {
  kBothRead = 1,   // both consumers have read all of K and V, or of what they prepare
  kDsWritten = 2,  // the gradients warpgroup has written dS
};

}  // namespace flash_attn::cuda::sm90::backward::pair
