// Launching kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "check.h"

namespace flash_attn::cuda {

/// Launches `num_blocks` blocks of `kernel`, which adds params.first_block to its blockIdx.x: one launch holds at most
/// 2^31 - 1 blocks. The limit of dynamic shared memory belongs to the current device, so it is set every time.
template <typename Params>
void launch_blocks(void (*kernel)(Params), Params params, int64_t num_blocks, int threads, int shared_bytes,
                   cudaStream_t stream, const char* name) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  constexpr int kSharedBytesWithoutOptIn = 47 << 10;  // of 48 KB, of which a kernel may have some beside these
  if (shared_bytes > kSharedBytesWithoutOptIn) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes),
          name);
  }
  for (int64_t first = 0; first < num_blocks; first += kMaxBlocks) {
    params.first_block = first;
    void* arguments[] = {&params};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                           dim3(unsigned(std::min(kMaxBlocks, num_blocks - first))), dim3(unsigned(threads)), arguments,
                           size_t(shared_bytes), stream),
          name);
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

}  // namespace flash_attn::cuda
