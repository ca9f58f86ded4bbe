// Which problems need more than the plain kernels.
#pragma once

#include "../../params.h"

namespace flash_attn::cuda::universal {

/// Anything beyond scaling, lengths, windows and sinks?
inline bool is_extended(const ForwardParams& p) {
  return p.mask.data != nullptr || p.alibi_slopes != nullptr || p.softcap > 0.0 || p.dropout_p > 0.0;
}

}  // namespace flash_attn::cuda::universal
