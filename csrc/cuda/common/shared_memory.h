// Dynamic shared memory beyond what a kernel has without asking.
#pragma once

namespace flash_attn::cuda {

/// Lets `kernel` have `bytes` on the current device. The driver takes 0.25 us for that, so a thread asks it once.
void allow_shared_bytes(const void* kernel, int bytes, const char* what);

}  // namespace flash_attn::cuda
