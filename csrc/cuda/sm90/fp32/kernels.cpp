#include "kernels.h"

namespace flash_attn::cuda::sm90::fp32 {

extern const sm80::fp32::Kernels kKernels = {"sm90",
                                             "wgmma fp32 ",
                                             {&kForwardD64, &kForwardD128, &kForwardD192, &kForwardD256},
                                             {&kBackwardD64, &kBackwardD128, &kBackwardD192, &kBackwardD256}};

}  // namespace flash_attn::cuda::sm90::fp32
