// What CTAs of a cluster read of each other's shared memory, and the halves of their barrier.
#pragma once

#include "cluster.h"

namespace flash_attn::cuda::sm90 {

FLASH_ATTN_DEVICE int cluster_id() {
  int id;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(id));
  return id;
}

/// cluster_sync in two: all threads arrive, and wait before they arrive again.
FLASH_ATTN_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
FLASH_ATTN_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

/// From an address of peer_address.
FLASH_ATTN_DEVICE float4 load_peer_float4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
FLASH_ATTN_DEVICE float2 load_peer_float2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

}  // namespace flash_attn::cuda::sm90
