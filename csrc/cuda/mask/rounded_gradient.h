// The gradient of a 16-bit attn_mask from what kernels have added up in float32.
#pragma once

#include <cuda_runtime_api.h>

#include "../../tensor_view.h"

namespace flash_attn::cuda::mask {

/// `count` numbers, as torch allocates them, to `to` of dtype kBFloat16 or kFloat16, of the same alignment.
void round_gradient(const float* from, void* to, DType dtype, int64_t count, cudaStream_t stream);

}  // namespace flash_attn::cuda::mask
