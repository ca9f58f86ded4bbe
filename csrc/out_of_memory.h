// What is thrown when memory runs out: torch's own words for it, by which programs that retry with less know it.
#pragma once

#include <cstdio>
#include <stdexcept>

#include "tensor_view.h"

namespace flash_attn {

/// `bytes` of them, for `name`. flash_attn/torch_op turns the text of CUDA into torch.OutOfMemoryError; torch raises
/// RuntimeError for the CPU.
[[noreturn]] inline void throw_out_of_memory(DeviceType device, double bytes, const char* name) {
  char text[240];
  if (device == DeviceType::kCPU) {
    std::snprintf(text, sizeof(text),
                  "DefaultCPUAllocator: can't allocate memory: you tried to allocate %.0f bytes (flash_attn: %s)",
                  bytes, name);
  } else {
    std::snprintf(text, sizeof(text), "CUDA out of memory: flash_attn could not allocate %.1f MiB for %s",
                  bytes / (1 << 20), name);
  }
  throw std::runtime_error(text);
}

}  // namespace flash_attn
