// Which kernels for float32 there is code for on which GPU: what the compiler leaves out and what the planner does not
// choose.
#pragma once

namespace flash_attn::cuda::sm80::fp32 {

/// `arch` is a compute capability times 10, as __CUDA_ARCH__. Before 9.0 ptxas spills registers of the largest backward
/// kernel, and both passes have to sum up scores alike, or large ones lose what they have in common.
constexpr bool has_code(int arch, int head_dim) { return arch < 1000 && (arch >= 900 || head_dim <= 64); }

}  // namespace flash_attn::cuda::sm80::fp32
