// Kernels for any NVIDIA GPU (sm_75 and later), any of the four dtypes, any head dimension and every feature. They use
// the ordinary arithmetic units alone.
#pragma once

#include <cuda_runtime_api.h>

#include "../../kernel.h"

namespace flash_attn::cuda::universal {

extern const ForwardKernel kForward;
extern const BackwardKernel kBackward;

/// float32 by the kernels that a call of the family gets on the device: of backward, dQ, dK and dV. `flags` as in
/// forward_launch.h.
void launch_float32(const ForwardParams& params, const int* flags, const DeviceInfo& device, cudaStream_t stream);
void launch_float32(const BackwardParams& params, const int* flags, const DeviceInfo& device, cudaStream_t stream);

}  // namespace flash_attn::cuda::universal
