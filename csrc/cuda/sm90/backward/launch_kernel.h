// A backward kernel with its shared memory. Only instantiation files include this.
#pragma once

#include "../../common/launch.h"
#include "../hopper/budgets.h"
#include "params.h"

namespace flash_attn::cuda::sm90::backward {

template <auto kKernel, int kThreads, int kSharedBytes>
void launch_kernel(const KernelParams& params, int grid, cudaStream_t stream) {
  static_assert(kSharedBytes <= kMaxSharedBytes, "the tiles do not fit");
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "sm90 shared memory");
  launch_dependent(kKernel, dim3(grid), kThreads, kSharedBytes, stream, params, "sm90 backward");
}

}  // namespace flash_attn::cuda::sm90::backward
