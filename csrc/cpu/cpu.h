// The CPU family.
#pragma once

#include "../kernel.h"

namespace flash_attn::cpu {

extern const ForwardKernel kForward;
extern const BackwardKernel kBackward;

}  // namespace flash_attn::cpu
