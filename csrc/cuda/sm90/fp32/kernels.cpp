#include "kernels.h"

namespace flash_attn::cuda::sm80::fp32 {

extern const Kernels kWgmmaKernels = {
    "sm90", "wgmma fp32 ", {&kWgmmaForwardD64, &kWgmmaForwardD128}, {&kWgmmaBackwardD64, &kWgmmaBackwardD128}};

}  // namespace flash_attn::cuda::sm80::fp32
