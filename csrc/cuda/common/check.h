// Errors of the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

namespace flash_attn::cuda {

/// Throws std::runtime_error, which names `what` was tried.
void check(cudaError_t error, const char* what);

}  // namespace flash_attn::cuda
