// Which kernel runs a problem: the first family of a device's list that does not refuse it.
#pragma once

#include <string>
#include <vector>

#include "backend.h"
#include "host_device.h"
#include "kernel.h"

namespace flash_attn {

/// Throws for CUDA in a library that was built without it.
FLASH_ATTN_EXPORT const Backend& backend_of(DeviceType device);

struct Rejection {
  std::string family, reason;
};

/// Whether FLASH_ATTN_FORCE asks for this family of CUDA kernels.
FLASH_ATTN_EXPORT bool is_forced(const char* family);

/// Whether FLASH_ATTN_FLOAT32 is "reduced": float32 may be rounded to fp16 where that is faster. Not set or "exact": it
/// may not; anything else throws.
FLASH_ATTN_EXPORT bool allows_reduced_float32();

/// The only family of CUDA kernels that FLASH_ATTN_FORCE allows; null: all are.
const char* forced_family();

/// As select_kernel; null if none takes the problem.
const ForwardKernel* find_kernel(const std::vector<const ForwardKernel*>& kernels, const ForwardParams& params,
                                 const DeviceInfo& info);

/// The kernel for `params`. FLASH_ATTN_FORCE=<family> allows only that family on CUDA and throws with its reason if it
/// refuses. `rejections`, if given, collects why each earlier family did not take the problem.
template <typename Params>
FLASH_ATTN_EXPORT const Kernel<Params>& select_kernel(const std::vector<const Kernel<Params>*>& kernels,
                                                      const Params& params, const DeviceInfo& info,
                                                      std::vector<Rejection>* rejections = nullptr);

}  // namespace flash_attn
