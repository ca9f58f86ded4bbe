// Instructions that only the backward pass needs: plain bulk copies and reductions, transposed stmatrix, clusters (PTX
// ISA 8.0, sections 9.7.9, 9.7.12, 9.7.13).
#pragma once

#include "ptx.h"

namespace flash_attn::sm90 {

// ---- bulk copies of `bytes` contiguous bytes, a multiple of 16

SM90_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

/// Copies shared to global memory; ends like bulk_reduce_add.
SM90_DEVICE void bulk_store(float* global, const float* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}

/// Adds floats of shared memory to global memory; ends with tma_store_commit and a wait, like a TMA store.
SM90_DEVICE void bulk_reduce_add(float* global, const float* shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

/// To shared memory of another CTA of the cluster, whose barrier counts the bytes; both are addresses from
/// peer_address.
SM90_DEVICE void bulk_copy_to_peer(uint32_t peer_shared, const void* shared, uint32_t bytes, uint32_t peer_barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(peer_shared),
      "r"(shared_address(shared)), "r"(bytes), "r"(peer_barrier)
      : "memory");
}

/// Orders what this thread has seen others write to global memory before its later bulk copies and reductions.
SM90_DEVICE void global_proxy_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- clusters

SM90_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// All threads of all CTAs of the cluster.
SM90_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Where CTA `rank` of the cluster has what this one has at `pointer`.
SM90_DEVICE uint32_t peer_address(const void* pointer, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

SM90_DEVICE void mbarrier_arrive_peer(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// ---- fragments

/// Two 8x8 matrices of 16-bit elements; lane l < 16 gives the address of row l % 8 of matrix l / 8.
SM90_DEVICE void stmatrix_x2(uint32_t row, uint32_t m0, uint32_t m1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(m0), "r"(m1) : "memory");
}

/// stmatrix_x4 of the transposed matrices.
SM90_DEVICE void stmatrix_x4_transposed(uint32_t row, const uint32_t* m) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m[0]),
               "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

SM90_DEVICE void store_shared(uint32_t address, const float* x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}

SM90_DEVICE void store_shared(uint32_t address, const uint32_t* x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

SM90_DEVICE void load_shared(uint32_t address, float* x) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(address)
               : "memory");
}

SM90_DEVICE void load_shared(uint32_t address, uint32_t* x) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

/// Stores or adds. By a predicate: a branch there costs the loop of products 5% [head dim 64].
SM90_DEVICE void global_store_or_add(bool store, float* global, const float* x) {
  asm volatile(
      "{\n"
      ".reg .pred store;\n"
      "setp.ne.s32 store, %5, 0;\n"
      "@store st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};\n"
      "@!store red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n"
      "}" ::"l"(global),
      "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(static_cast<int>(store))
      : "memory");
}

/// Declares that the next product overwrites `acc`, so that no register is set before it.
template <int kSize>
SM90_DEVICE void wgmma_discard(float (&acc)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "=f"(acc[i]));
}

}  // namespace flash_attn::sm90
