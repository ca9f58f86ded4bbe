// 16-byte pieces of rows that need not be whole, or not be copied.
#pragma once

#include "mma.h"

namespace flash_attn::cuda::sm80 {

/// The first `bytes` of 16, and zeros.
SM80_DEVICE void cp_async_part(uint32_t address, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
}

/// All of them, or nothing is read or written.
SM80_DEVICE void cp_async_16_if(uint32_t address, const void* source, uint32_t copies) {
  asm volatile(
      "{\n"
      ".reg .pred copies;\n"
      "setp.ne.u32 copies, %2, 0;\n"
      "@copies cp.async.cg.shared.global [%0], [%1], 16;\n"
      "}" ::"r"(address),
      "l"(source), "r"(copies)
      : "memory");
}

}  // namespace flash_attn::cuda::sm80
