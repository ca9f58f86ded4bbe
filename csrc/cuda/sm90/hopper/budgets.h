// What a CTA has: registers, which warpgroups may pass to each other, and shared memory.
#pragma once

#include "../../common/ptx.h"

namespace flash_attn::cuda::sm90 {

constexpr int kMaxSharedBytes = 232448;  // a CTA's, on compute capability 9.0

/// Registers a thread, by all warps of a warpgroup: a multiple of 8 from 24 to 256.
template <int kRegisters>
FLASH_ATTN_DEVICE void register_budget_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
FLASH_ATTN_DEVICE void register_budget_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace flash_attn::cuda::sm90
