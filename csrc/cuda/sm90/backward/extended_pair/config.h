// What a kernel of extended_pair/ is compiled for, and its shared memory.
#pragma once

#include "../extended/config.h"
#include "../pair/config.h"

namespace flash_attn::cuda::sm90::backward {

namespace extended_pair {

/// kStoresDmask: attn_mask's gradient is wanted, and tiles add it up.
template <typename Element, int kHeadDim, int kHeadDimV, bool kStoresDmask_>
struct ExtendedConfig : pair::KernelConfig<Element, kHeadDim, kHeadDimV> {
  using Base = pair::KernelConfig<Element, kHeadDim, kHeadDimV>;
  static constexpr bool kExtended = true;
  static constexpr bool kStoresDmask = kStoresDmask_;
  static constexpr bool kManyRegisters = true, kTakesBias = true;  // as in extended/config.h
  static constexpr int kWords = 1;                                 // likewise
  static constexpr int kChunkSteps = kStoresDmask ? 10 : 12;       // what shared memory has room for
};

/// Named barriers, beside pair/config.h's.
enum Barrier : int { kWarpgroup = 3 };  // + its number: its own threads

/// Arrivals at steps_empty: the producer's, the consumers' threads', and of those that follow turns: in a fixed order
/// of dQ, and of attn_mask's gradient.
template <typename Config>
FLASH_ATTN_DEVICE int num_step_readers(const KernelParams& params) {
  if constexpr (!Config::kStoresDmask) return 1 + 256 + (params.is_ordered() ? 2 : 0);
  return 1 + 256 + (params.is_ordered() ? 1 : 0) + (params.extended.dmask_counters != nullptr ? 1 : 0);
}

}  // namespace extended_pair

namespace pair {

/// As the primary template, of which it has what tiles prepare no rows for and takes statistics as floats, and with
/// one buffer for P: the place of the other is the bias's.
template <typename Element, int kHeadDim, int kHeadDimV, bool kStoresDmask>
struct SharedStorage<extended_pair::ExtendedConfig<Element, kHeadDim, kHeadDimV, kStoresDmask>> {
  using Config = extended_pair::ExtendedConfig<Element, kHeadDim, kHeadDimV, kStoresDmask>;
  alignas(1024) uint64_t k_full;
  uint64_t v_full, q_full[2], q_empty[2], dout_full, dout_empty, p_full, p_empty;
  uint64_t ds_full[2], ds_peer_full[2], ds_free[2];
  // As in extended/config.h.
  uint64_t bias_full, bias_empty, steps_full[extended::kChunks], steps_empty[extended::kChunks];
  DqTurns dq_turns, dmask_turns[kStoresDmask ? 1 : 0];
  Dropout dropout;
  extended::ListPlace list;
  Tile tile;
  extended::StepChunk<Config::kChunkSteps> chunks[extended::kChunks];

  alignas(128) uint8_t statistics[2][Config::kBytesStatistics];  // see RowsParams::extended

  alignas(1024) uint8_t k[Config::kBytes], v[Config::kBytesV];  // [panel][64 key rows][64]
  alignas(1024) uint8_t k_peer[Config::kBytesPeer];             // the peer's key rows, this CTA's half of the columns
  alignas(1024) uint8_t q[2][Config::kBytes], dout[Config::kBytesV];                  // [panel][64 query rows][64]
  alignas(1024) uint8_t ds[2][Config::kPanelBytes], ds_peer[2][Config::kPanelBytes];  // [64 query rows][64 key rows]
  alignas(1024) uint8_t bias[Config::kPanelBytes];                                    // likewise, 16-bit elements
  alignas(128) uint8_t p[Config::kBytesP];                                            // [16 bytes of a thread][128]
};

}  // namespace pair
}  // namespace flash_attn::cuda::sm90::backward
