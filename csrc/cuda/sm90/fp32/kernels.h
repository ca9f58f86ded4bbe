// Hopper's kernels for float32: those of sm80/fp32 with products by warpgroups.
#pragma once

#include "../../sm80/fp32/kernels.h"

namespace flash_attn::cuda::sm90::fp32 {

using sm80::fp32::BackwardVariant, sm80::fp32::BackwardVariants;
using sm80::fp32::ForwardVariant, sm80::fp32::ForwardVariants;

extern const ForwardVariants kForwardD64, kForwardD128, kForwardD192, kForwardD256;
extern const BackwardVariants kBackwardD64, kBackwardD128, kBackwardD192, kBackwardD256;
extern const ForwardVariants kReducedForwardD64, kReducedForwardD128;
extern const BackwardVariants kReducedBackwardD64, kReducedBackwardD128;
extern const sm80::fp32::Kernels kKernels;

}  // namespace flash_attn::cuda::sm90::fp32
