// What a kernel of the family does to scores between the products, beside scale, causal, windows and lengths.
#pragma once

#include <cstdint>

#include "../../params.h"

namespace flash_attn::cuda::sm80 {

enum class Rules {
  kPlain,
  kDropout,
  kMask,      // a boolean one
  kExtended,  // all there is: softcap, ALiBi, additive masks, tensors that 16-byte pieces do not fit; in natural units
  kBias,      // an additive mask of the tensors' dtype, whose rows consist of whole 16-byte pieces; in natural units
};

inline bool has_aligned_bias(const ForwardParams& p) {
  const MaskView& mask = p.mask;
  return p.has_bias() && mask.dtype == p.dtype && mask.col == 1 && mask.row % 8 == 0 && mask.head % 8 == 0 &&
         mask.batch % 8 == 0 && reinterpret_cast<uintptr_t>(mask.data) % 16 == 0;
}

/// The least that the problem needs. `aligned`: all of its tensors consist of whole 16-byte pieces.
inline Rules rules_of(const ForwardParams& p, bool aligned) {
  const bool has_mask = p.mask.data != nullptr, has_dropout = p.dropout_p > 0.0;
  if (!aligned || p.alibi_slopes != nullptr || p.softcap > 0.0 || (has_mask && has_dropout)) return Rules::kExtended;
  if (!has_mask) return has_dropout ? Rules::kDropout : Rules::kPlain;
  return p.has_bool_mask() ? Rules::kMask : has_aligned_bias(p) ? Rules::kBias : Rules::kExtended;
}

/// Whether a kernel does what a problem needs. Kernels that do less are faster; some head dims have no others.
inline bool serves(Rules kernel, Rules problem) {
  return kernel == problem || (kernel == Rules::kExtended && problem != Rules::kPlain);
}

}  // namespace flash_attn::cuda::sm80
