// CTAs of a cluster: their ranks, their barriers, and what one reads of another's shared memory and does to it.
#pragma once

#include "../../common/ptx.h"

namespace flash_attn::cuda::sm90 {

FLASH_ATTN_DEVICE int cluster_id() {
  int id;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(id));
  return id;
}

FLASH_ATTN_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// All threads of all CTAs of the cluster.
FLASH_ATTN_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// cluster_sync in two: all threads arrive, and wait before they arrive again.
FLASH_ATTN_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
FLASH_ATTN_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

/// Where CTA `rank` of the cluster has what this one has at `pointer`.
FLASH_ATTN_DEVICE uint32_t peer_address(const void* pointer, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

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

FLASH_ATTN_DEVICE void mbarrier_arrive_peer(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// To shared memory of another CTA of the cluster, whose barrier counts the bytes; both are addresses from
/// peer_address.
FLASH_ATTN_DEVICE void bulk_copy_to_peer(uint32_t peer_shared, const void* shared, uint32_t bytes,
                                         uint32_t peer_barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(peer_shared),
      "r"(shared_address(shared)), "r"(bytes), "r"(peer_barrier)
      : "memory");
}

}  // namespace flash_attn::cuda::sm90
