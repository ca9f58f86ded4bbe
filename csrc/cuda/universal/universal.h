// Kernels for any NVIDIA GPU (sm_75 and later), any of the four dtypes, any head dimension and every feature. They use
// the ordinary arithmetic units alone.
#pragma once

#include "../../kernel.h"

namespace flash_attn::cuda::universal {

extern const ForwardKernel kForward;
extern const BackwardKernel kBackward;

}  // namespace flash_attn::cuda::universal
