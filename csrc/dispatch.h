// Which kernel runs a problem: the first family of a device's list that does not refuse it.
#pragma once

#include <string>
#include <vector>

#include "host_device.h"
#include "kernel.h"

namespace flash_attn {

/// A device type as the ops see it.
struct Backend {
  /// Fastest family first; the last one refuses nothing.
  std::vector<const ForwardKernel*> forward;
  std::vector<const BackwardKernel*> backward;
  DeviceInfo (*device_info)(int device_index);
  /// Makes the device current for the calling thread and returns the stream to launch on; `leave` undoes it.
  void* (*enter)(int device_index, int* previous_device);
  void (*leave)(int device_index, int previous_device);
};

FLASH_ATTN_EXPORT const Backend& cpu_backend();
#ifdef FLASH_ATTN_WITH_CUDA
FLASH_ATTN_EXPORT const Backend& cuda_backend();
#endif

struct Rejection {
  std::string family, reason;
};

/// The kernel for `params`. FLASH_ATTN_FORCE=<family> allows only that family on CUDA and throws with its reason if it
/// refuses. `rejections`, if given, collects why each earlier family did not take the problem.
template <typename Params>
FLASH_ATTN_EXPORT const Kernel<Params>& select_kernel(const std::vector<const Kernel<Params>*>& kernels,
                                                      const Params& params, const DeviceInfo& info,
                                                      std::vector<Rejection>* rejections = nullptr);

}  // namespace flash_attn
