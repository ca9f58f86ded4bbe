#include "kernels.h"

namespace flash_attn::cuda::sm90::fp32 {
namespace {

const sm80::fp32::Kernels kReduced = {"sm90",
                                      "wgmma fp32 ",
                                      "of numbers rounded to fp16",
                                      {&kReducedForwardD64, &kReducedForwardD128},
                                      {&kReducedBackwardD64, &kReducedBackwardD128},
                                      nullptr};

}  // namespace

extern const sm80::fp32::Kernels kKernels = {"sm90",
                                             "wgmma fp32 ",
                                             "of pairs of fp16",
                                             {&kForwardD64, &kForwardD128, &kForwardD192, &kForwardD256},
                                             {&kBackwardD64, &kBackwardD128, &kBackwardD192, &kBackwardD256},
                                             &kReduced};

}  // namespace flash_attn::cuda::sm90::fp32
