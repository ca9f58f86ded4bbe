// Kernels for Hopper (sm_90a): TMA, wgmma, warp specialisation.
#pragma once

#include "../../kernel.h"

namespace flash_attn::sm90 {

extern const ForwardKernel kForward;
extern const BackwardKernel kBackward;

}  // namespace flash_attn::sm90
