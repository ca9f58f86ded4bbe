// Attention of few query rows over many keys, plain or in a cache, on tensor cores, for any NVIDIA GPU since Ampere.
#pragma once

#include "../../kernel.h"

namespace flash_attn::cuda::decode {

extern const ForwardKernel kForward;

}  // namespace flash_attn::cuda::decode
