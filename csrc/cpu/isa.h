// The passes, once for every instruction set they are compiled for.
#pragma once

#include "../params.h"

namespace flash_attn::cpu {

// Query rows and key rows of a tile.
constexpr int64_t kForwardBlockM = 96, kForwardBlockN = 64;
constexpr int64_t kBackwardBlockM = 96, kBackwardBlockN = 128;

}  // namespace flash_attn::cpu

#define FLASH_ATTN_CPU_DECLARE_PASSES(isa)    \
  namespace flash_attn::cpu::isa {            \
  void run_forward(const ForwardParams& p);   \
  void run_backward(const BackwardParams& p); \
  }

FLASH_ATTN_CPU_DECLARE_PASSES(generic)
FLASH_ATTN_CPU_DECLARE_PASSES(avx2)
FLASH_ATTN_CPU_DECLARE_PASSES(avx512)
FLASH_ATTN_CPU_DECLARE_PASSES(avx512_bf16)
FLASH_ATTN_CPU_DECLARE_PASSES(amx)

#undef FLASH_ATTN_CPU_DECLARE_PASSES
