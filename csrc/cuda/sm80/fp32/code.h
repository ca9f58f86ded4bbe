// Which kernels for float32 there is code for on which GPU: what the compiler leaves out and what the planner does not
// choose.
#pragma once

namespace flash_attn::cuda::sm80::fp32 {

/// `arch` is a compute capability times 10, as __CUDA_ARCH__.
constexpr bool has_code(int arch) { return arch < 1000; }

}  // namespace flash_attn::cuda::sm80::fp32
