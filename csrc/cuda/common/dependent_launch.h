// Programmatic dependent launch, from the kernels' side; the host's is launch_dependent in launch.h. GPUs before Hopper
// start a kernel when the one before it has ended.
#pragma once

#include "ptx.h"

namespace flash_attn::cuda {

/// The next kernel of the stream may start.
FLASH_ATTN_DEVICE void grid_launch_dependents() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Until the kernel before this one has ended and what it wrote is visible; nothing if it has.
FLASH_ATTN_DEVICE void grid_dependency_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace flash_attn::cuda
