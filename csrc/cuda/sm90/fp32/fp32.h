// float32 in the Hopper family: see fp32.cpp.
#pragma once

#include "../../../kernel.h"

namespace flash_attn::cuda::sm90::fp32 {

extern const ForwardKernel kForward;
extern const BackwardKernel kBackward;

}  // namespace flash_attn::cuda::sm90::fp32
