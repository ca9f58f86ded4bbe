#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/launch.h"
#include "rounded_gradient.h"

namespace flash_attn::cuda::mask {
namespace {

constexpr int kThreads = 256, kNumbers = 8;  // of a thread

struct RoundArguments {
  const float* from;
  void* to;
  int64_t count, first_block;
};

template <typename Element>
__global__ void __launch_bounds__(kThreads) round_kernel(const __grid_constant__ RoundArguments arguments) {
  const int64_t first = ((arguments.first_block + blockIdx.x) * kThreads + threadIdx.x) * kNumbers;
  const float* const from = arguments.from + first;
  Element* const to = static_cast<Element*>(arguments.to) + first;
  if (first + kNumbers <= arguments.count) {
    const float4 low = __ldcs(reinterpret_cast<const float4*>(from)),
                 high = __ldcs(reinterpret_cast<const float4*>(from) + 1);
    alignas(16) Element rounded[kNumbers] = {Element(low.x),  Element(low.y),  Element(low.z),  Element(low.w),
                                             Element(high.x), Element(high.y), Element(high.z), Element(high.w)};
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(rounded);
  } else {
    for (int64_t i = 0; first + i < arguments.count; ++i) to[i] = Element(from[i]);
  }
}

}  // namespace

void round_gradient(const float* from, void* to, DType dtype, int64_t count, cudaStream_t stream) {
  constexpr int64_t kOfBlock = kThreads * kNumbers;
  const RoundArguments arguments{from, to, count, 0};
  cuda::launch_blocks(dtype == DType::kBFloat16 ? round_kernel<__nv_bfloat16> : round_kernel<__half>, arguments,
                      (count + kOfBlock - 1) / kOfBlock, kThreads, 0, stream, "rounding attn_mask's gradient");
}

}  // namespace flash_attn::cuda::mask
