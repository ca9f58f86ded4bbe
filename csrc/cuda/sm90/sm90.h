// Kernels for Hopper (sm_90a): TMA, wgmma, warp specialisation.
#pragma once

#include "../../kernel.h"

namespace flash_attn::cuda::sm90 {

namespace forward {
extern const ForwardKernel kKernel;
}
namespace backward {
extern const BackwardKernel kKernel;
}

}  // namespace flash_attn::cuda::sm90
