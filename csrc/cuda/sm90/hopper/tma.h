// The copy engine: tensor memory accelerator (TMA) copies of boxes of up to five dimensions, plain bulk copies and
// reductions (PTX ISA, "Data Movement and Conversion Instructions: Bulk copy"), and the fences between it and what
// threads read and write.
#pragma once

#include <cuda.h>

#include "../../common/ptx.h"

namespace flash_attn::cuda::sm90 {

// ---- boxes; coordinate 0 is the fastest

struct Coordinates {
  int c0, c1, c2, c3, c4;
};

FLASH_ATTN_DEVICE void tma_load(void* shared, const CUtensorMap* map, uint64_t* barrier, Coordinates at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(at.c0), "r"(at.c1), "r"(at.c2), "r"(at.c3), "r"(at.c4)
      : "memory");
}

FLASH_ATTN_DEVICE void tma_store(const CUtensorMap* map, uint32_t shared, Coordinates at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(shared), "r"(at.c0), "r"(at.c1), "r"(at.c2), "r"(at.c3), "r"(at.c4)
      : "memory");
}

FLASH_ATTN_DEVICE void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

FLASH_ATTN_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Until at most kPending groups of this thread's stores have still to read shared memory.
template <int kPending = 0>
FLASH_ATTN_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
/// Until this thread's stores are complete.
FLASH_ATTN_DEVICE void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- bulk copies of `bytes` contiguous bytes, a multiple of 16

FLASH_ATTN_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

/// Copies shared to global memory; ends like bulk_reduce_add.
FLASH_ATTN_DEVICE void bulk_store(float* global, const float* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}

/// Adds floats of shared memory to global memory; ends with tma_store_commit and a wait, like a TMA store.
FLASH_ATTN_DEVICE void bulk_reduce_add(float* global, const float* shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// ---- fences

/// Orders this thread's writes to shared memory before later reads by the copy engine and by wgmma.
FLASH_ATTN_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Orders what this thread has seen others write to global memory before its later bulk copies and reductions.
FLASH_ATTN_DEVICE void global_proxy_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace flash_attn::cuda::sm90
