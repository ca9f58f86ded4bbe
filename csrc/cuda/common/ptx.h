// Instructions that CUDA C++ has no function for and that every family uses, one function each. What a function waits
// for, or what it makes visible to whom, stands at its callers. The Hopper family's own are in sm90/hopper.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define FLASH_ATTN_DEVICE __device__ __forceinline__

namespace flash_attn::cuda {

FLASH_ATTN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Unlike threadIdx.x % 32 always read anew, where registers are few.
FLASH_ATTN_DEVICE int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

/// From here on the compiler keeps nothing that it has derived from x: where registers are few, working it out again is
/// better than spilling it.
FLASH_ATTN_DEVICE void forget_derived(uint32_t& x) { asm volatile("" : "+r"(x)); }

// ---- shared memory, four words at a time

FLASH_ATTN_DEVICE void store_shared(uint32_t address, const float* x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}

FLASH_ATTN_DEVICE void store_shared(uint32_t address, const uint32_t* x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

FLASH_ATTN_DEVICE void load_shared(uint32_t address, float* x) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(address)
               : "memory");
}

FLASH_ATTN_DEVICE void load_shared(uint32_t address, uint32_t* x) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// ---- named barriers

FLASH_ATTN_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

FLASH_ATTN_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// True in every thread when `vote` is true in one.
FLASH_ATTN_DEVICE bool named_barrier_any(int id, int threads, bool vote) {
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

// ---- arithmetic

FLASH_ATTN_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two floats as a register of 16-bit elements, `low` in the lower half.
template <typename Element>
FLASH_ATTN_DEVICE uint32_t pack(float low, float high);
template <>
FLASH_ATTN_DEVICE uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
FLASH_ATTN_DEVICE uint32_t pack<__half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

/// The same of what this rounding leaves of them; of infinity nothing.
template <typename Element>
FLASH_ATTN_DEVICE uint32_t pack_rest(float low, float high) {
  const auto rest = [](float x) {
    const float rounded = static_cast<float>(static_cast<Element>(x));
    return isinf(rounded) ? 0.f : x - rounded;
  };
  return pack<Element>(rest(low), rest(high));
}

}  // namespace flash_attn::cuda
