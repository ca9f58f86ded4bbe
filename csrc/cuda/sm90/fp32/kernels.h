// Hopper's kernels for float32: those of sm80/fp32 with products by warpgroups.
#pragma once

#include "../../sm80/fp32/kernels.h"

namespace flash_attn::cuda::sm80::fp32 {

extern const ForwardVariants kWgmmaForwardD64, kWgmmaForwardD128;
extern const BackwardVariants kWgmmaBackwardD64, kWgmmaBackwardD128;

}  // namespace flash_attn::cuda::sm80::fp32
