// What the host hands to an extended forward kernel.
#pragma once

#include "../../../common/scores/softcap.h"
#include "../../../mask/bad_rows.h"
#include "../../../mask/packed_mask.h"
#include "../params.h"

namespace flash_attn::cuda::sm90::forward {

struct ExtendedParams : KernelParams {
  CUtensorMap bias;         // an additive attn_mask in boxes of 64 rows and columns, see make_mask_map()
  mask::PackedMask packed;  // seen null: there is no attn_mask, or it is additive and was not read ahead
  mask::BadRows bad_rows;   // then; words null: the tiles look for themselves
  // Scores are in natural units when something is added to them or bends them, else q.k.
  bool natural;
  bool has_bits;  // attn_mask is boolean
  bool has_dropout;
  bool mask_pairs;                // columns 2 j and 2 j + 1 of an additive mask are one aligned word
  float scale, softcap, inner;    // see ScoreRules
  CapPolynomial cap;              // with softcap
  mask::KindCondition condition;  // of attn_mask
};

}  // namespace flash_attn::cuda::sm90::forward
