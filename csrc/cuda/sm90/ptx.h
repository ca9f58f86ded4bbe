// Hopper's instructions that CUDA C++ has no function for, one function each (PTX ISA 8.0, sections 9.7.9, 9.7.13,
// 9.7.15). What a function waits for, or what it makes visible to whom, stands at its callers.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define SM90_DEVICE __device__ __forceinline__

namespace flash_attn::sm90 {

SM90_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Unlike threadIdx.x % 32 always read anew, where registers are few.
SM90_DEVICE int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

/// From here on the compiler keeps nothing that it has derived from x: where registers are few, working it out again is
/// better than spilling it.
SM90_DEVICE void forget_derived(uint32_t& x) { asm volatile("" : "+r"(x)); }

// ---- mbarrier: one phase completes when the expected arrivals and the expected bytes are in

SM90_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

/// Makes the initialised barriers visible to the copy engine.
SM90_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

SM90_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

SM90_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

/// Waits until the phase of this parity has completed.
SM90_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- named barriers and register budgets

SM90_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

SM90_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// True in every thread when `vote` is true in one.
SM90_DEVICE bool named_barrier_any(int id, int threads, bool vote) {
  uint32_t any;
  asm volatile(
      "{.reg .pred in, out;\n"
      "setp.ne.u32 in, %1, 0;\n"
      "bar.red.or.pred out, %2, %3, in;\n"
      "selp.u32 %0, 1, 0, out;}"
      : "=r"(any)
      : "r"(static_cast<uint32_t>(vote)), "r"(id), "r"(threads)
      : "memory");
  return any != 0;
}

template <int kRegisters>
SM90_DEVICE void register_budget_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
SM90_DEVICE void register_budget_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- tensor memory accelerator (TMA): copies of boxes of up to five dimensions; coordinate 0 is the fastest

struct Coordinates {
  int c0, c1, c2, c3, c4;
};

SM90_DEVICE void tma_load(void* shared, const CUtensorMap* map, uint64_t* barrier, Coordinates at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(at.c0), "r"(at.c1), "r"(at.c2), "r"(at.c3), "r"(at.c4)
      : "memory");
}

SM90_DEVICE void tma_store(const CUtensorMap* map, uint32_t shared, Coordinates at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(shared), "r"(at.c0), "r"(at.c1), "r"(at.c2), "r"(at.c3), "r"(at.c4)
      : "memory");
}

SM90_DEVICE void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

SM90_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Until at most kPending groups of this thread's stores have still to read shared memory.
template <int kPending = 0>
SM90_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
/// Until this thread's stores are complete.
SM90_DEVICE void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

/// Orders this thread's writes to shared memory before later reads by the copy engine and by wgmma.
SM90_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- programmatic dependent launch

/// The next kernel of the stream may start.
SM90_DEVICE void grid_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
/// Until the kernel before this one has ended and what it wrote is visible; nothing if it has.
SM90_DEVICE void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- matrices and arithmetic

/// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
SM90_DEVICE void stmatrix_x4(uint32_t row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m0), "r"(m1), "r"(m2),
               "r"(m3)
               : "memory");
}

SM90_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two floats as a register of 16-bit elements, `low` in the lower half.
template <typename Element>
SM90_DEVICE uint32_t pack(float low, float high);
template <>
SM90_DEVICE uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
SM90_DEVICE uint32_t pack<__half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

/// The same of what this rounding leaves of them; of infinity nothing.
template <typename Element>
SM90_DEVICE uint32_t pack_rest(float low, float high) {
  const auto rest = [](float x) {
    const float rounded = static_cast<float>(static_cast<Element>(x));
    return isinf(rounded) ? 0.f : x - rounded;
  };
  return pack<Element>(rest(low), rest(high));
}

}  // namespace flash_attn::sm90
