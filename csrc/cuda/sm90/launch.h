// Launching and its errors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace flash_attn::sm90 {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("flash_attn: sm90 ") + what + ": " + cudaGetErrorString(error));
  }
}

/// Unlike any other launch's, and unlike what memory may hold by chance.
uint64_t new_launch_id();

/// Launches a kernel that may start before the one before it in the stream has ended: it calls grid_dependency_wait()
/// before it touches what that one writes.
template <typename Params>
void launch_dependent(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                      const Params& params, const char* what) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), what);
}

}  // namespace flash_attn::sm90
