#include "kernels.h"

namespace flash_attn::cuda::sm80::fp32 {

extern const Kernels kMmaKernels = {"sm80", "mma fp32 ", {&kForwardD32, &kForwardD64}, {&kBackwardD32, &kBackwardD64}};

}  // namespace flash_attn::cuda::sm80::fp32
