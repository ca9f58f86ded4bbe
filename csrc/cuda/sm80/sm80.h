// Tensor-core kernels for fp16 and bf16 on any NVIDIA GPU since Ampere (compute capability 8.0): mma.sync, ldmatrix,
// cp.async. On Hopper they take what the kernels of sm90/ do not.
#pragma once

#include "../../kernel.h"

namespace flash_attn::cuda::sm80 {

extern const ForwardKernel kForward;
extern const BackwardKernel kBackward;

}  // namespace flash_attn::cuda::sm80
