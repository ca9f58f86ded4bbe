// Which values of attn_mask let a score be seen: True, and everything but -inf.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

namespace flash_attn::cuda::mask {

__device__ __forceinline__ bool is_seen(uint8_t x) { return x != 0; }
__device__ __forceinline__ bool is_seen(float x) { return x != -INFINITY; }
__device__ __forceinline__ bool is_seen(__nv_bfloat16 x) { return __bfloat162float(x) != -INFINITY; }
__device__ __forceinline__ bool is_seen(__half x) { return __half2float(x) != -INFINITY; }

}  // namespace flash_attn::cuda::mask
