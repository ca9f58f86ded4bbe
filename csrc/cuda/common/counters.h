// Counters in global memory, by which CTAs of one launch wait for each other.
#pragma once

#include "ptx.h"

namespace flash_attn::cuda {

FLASH_ATTN_DEVICE int load_acquire(const int* from) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

/// Waits until `count` have counted; what they had written before is then visible.
FLASH_ATTN_DEVICE void wait_for_count(const int* counter, int count) {
  while (load_acquire(counter) < count) {
  }
}

/// What this thread knows to be written is visible to whoever sees the count.
FLASH_ATTN_DEVICE void add_to_count(int* counter) {
  asm volatile("fence.acq_rel.gpu;\nred.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

}  // namespace flash_attn::cuda
