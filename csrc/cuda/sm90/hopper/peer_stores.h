// Stores to the shared memory of another CTA of the cluster, which that CTA's barrier counts by their bytes, so that
// nobody waits for a fence. Addresses are those of peer_address.
#pragma once

#include "cluster.h"

namespace flash_attn::cuda::sm90 {

FLASH_ATTN_DEVICE void send_to_peer(uint32_t peer_shared, const float* x, uint32_t peer_barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(peer_shared),
      "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(peer_barrier)
      : "memory");
}
FLASH_ATTN_DEVICE void send_to_peer(uint32_t peer_shared, float2 x, uint32_t peer_barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(peer_shared),
               "f"(x.x), "f"(x.y), "r"(peer_barrier)
               : "memory");
}

/// cluster_arrive of threads whose writes to shared memory are visible without it.
FLASH_ATTN_DEVICE void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

}  // namespace flash_attn::cuda::sm90
