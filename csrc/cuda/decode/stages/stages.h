// The stages' barriers: some warps fill stages with cp.async, the others use them.
#pragma once

#include "../../common/ptx.h"

namespace flash_attn::cuda::decode {

FLASH_ATTN_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

/// What this thread has done with memory is seen by whoever waits for the barrier.
FLASH_ATTN_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("{.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(barrier)) : "memory");
}

/// The same when all copies that this thread has asked for are there.
FLASH_ATTN_DEVICE void barrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/// Until the barrier's phase of this parity is over.
FLASH_ATTN_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t over;
  do {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(over)
        : "r"(address), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(over)
        : "r"(address), "r"(parity)
        : "memory");
#endif
  } while (over == 0);
}

/// A barrier of the threads that compute.
template <typename C>
FLASH_ATTN_DEVICE void consumers_sync() {
  named_barrier_sync(1, C::kConsumers);
}

struct StageBarriers {
  static constexpr int kStages = 6;
  uint64_t full[kStages], empty[kStages];

  /// By one thread; a barrier of the CTA follows.
  FLASH_ATTN_DEVICE void init(int loaders, int users) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + i, 32 * loaders + 1);  // the warps' copies, and what one thread says of the stage
      barrier_init(empty + i, users);
    }
  }
};

/// Which stage is next, and how often the ring has been gone round.
struct StagePlace {
  int stage = 0, parity = 0;
  FLASH_ATTN_DEVICE void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

}  // namespace flash_attn::cuda::decode
