// Attention of few query rows over many keys, plain or in a cache, on tensor cores, for any NVIDIA GPU since Ampere.
#pragma once

#include "../../float8.h"
#include "../../kernel.h"

namespace flash_attn::cuda::decode {

extern const ForwardKernel kForward;
extern const Kernel<Float8Params> kFloat8Forward;

}  // namespace flash_attn::cuda::decode
