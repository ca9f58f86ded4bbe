// What the host gives to a kernel of extended/ beside KernelParams' other fields.
#pragma once

#include <cuda.h>

#include "../../../../packed_mask.h"

namespace flash_attn::cuda::sm90::backward {

namespace extended {

/// What happens to a step's scores. Those of attn_mask's classes stand in Step::rules, the others in
/// ExtendedParams::rules.
enum Rule : int {
  kNone = 0,
  kHidden = 1,     // some are hidden by attn_mask's bits
  kBiased = 2,     // attn_mask is added to some
  kLoadsBias = 4,  // and consumers load its values themselves
  kDropout = 8,
  kAlibi = 16,
  kSoftcap = 32,
  kDmask = 64,       // dS leaves as attn_mask's gradient: beside kBiased alone
  kDslopes = 128,    // dS times distance is summed up
  kAtRunTime = 256,  // compiled in: the others, but kLoadsBias and kDmask, are looked up
};

}  // namespace extended

/// A packed attn_mask by tiles and query blocks, (batch | 1, heads | 1, key blocks | 1, query blocks | 1); a stride is
/// 0 where broadcast.
struct TileClasses {
  uint8_t* data;  // what a block holds: mask::kSeen and others; null: nothing is packed
  // Of a block in which some scores are hidden: a bit for each of a consumer's warp's, see ScoreBits; (blocks, 8 warps,
  // kBlockM / 64, 32 lanes).
  uint32_t* bits;
  int batch, head, key_block, query_block;
};

struct ExtendedParams {
  CUtensorMap bias;          // an additive attn_mask in boxes of kBlockM rows and 64 keys, see make_mask_map()
  TileClasses classes;       // of attn_mask; else it is read where it lies
  int rules;                 // of all scores, see extended::Rule
  bool has_bias;             // attn_mask is added
  bool bias_by_tma;          // by way of `bias`
  float scale_over_softcap;  // softmax_scale / softcap
  float softcap;             // 0: none
  float dropout_scale;       // 1 without dropout
  // Per batch entry, query head, tile and warp of the consumers, 0 at first: sums of dS times distance; null: not
  // wanted.
  float* slope_sums;
  float* dmask;  // stored by the tiles themselves; null: not wanted, or another launch's
  // (slices of the mask, num_n_blocks, num_m_blocks), 0 at first: how many have added there, see extended/dmask.h;
  // null: each number belongs to one score.
  int* dmask_counters;
  const int* blind;  // (num_heads * num_blocks, kBlockM / 64): whether some of 64 rows sees nothing
};

}  // namespace flash_attn::cuda::sm90::backward
