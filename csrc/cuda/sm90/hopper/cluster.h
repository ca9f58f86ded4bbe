// CTAs of a cluster: their ranks, their barriers, and what one does to another's shared memory.
#pragma once

#include "../../common/ptx.h"

namespace flash_attn::cuda::sm90 {

FLASH_ATTN_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// All threads of all CTAs of the cluster.
FLASH_ATTN_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Where CTA `rank` of the cluster has what this one has at `pointer`.
FLASH_ATTN_DEVICE uint32_t peer_address(const void* pointer, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
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
