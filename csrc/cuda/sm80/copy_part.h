// 16-byte pieces of rows that need not be whole.
#pragma once

#include "mma.h"

namespace flash_attn::cuda::sm80 {

/// The first `bytes` of 16, and zeros.
SM80_DEVICE void cp_async_part(uint32_t address, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
}

}  // namespace flash_attn::cuda::sm80
