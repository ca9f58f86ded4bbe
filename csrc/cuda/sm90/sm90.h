// Kernels for Hopper (sm_90a): TMA, wgmma, warp specialisation.
#pragma once

#include "../../kernel.h"

namespace flash_attn::cuda::sm90 {

// The family's, for every dtype; of them, those for 16 bits.
extern const ForwardKernel kForward;
extern const BackwardKernel kBackward;
namespace forward {
extern const ForwardKernel kKernel;
}
namespace backward {
extern const BackwardKernel kKernel;
}

}  // namespace flash_attn::cuda::sm90
