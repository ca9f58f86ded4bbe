// mbarriers in shared memory (PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier"): a phase
// completes when the expected arrivals and the expected bytes are in.
#pragma once

#include "../../common/ptx.h"

namespace flash_attn::cuda::sm90 {

FLASH_ATTN_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

/// Makes the initialised barriers visible to the copy engine.
FLASH_ATTN_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

FLASH_ATTN_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

FLASH_ATTN_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

/// Waits until the phase of this parity has completed.
FLASH_ATTN_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace flash_attn::cuda::sm90
