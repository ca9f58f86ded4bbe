// Which gradients a backward kernel for float32 computes.
#pragma once

namespace flash_attn::cuda::sm80::fp32 {

enum Gradients : int { kDq = 1, kDk = 2, kDv = 4 };

}  // namespace flash_attn::cuda::sm80::fp32
