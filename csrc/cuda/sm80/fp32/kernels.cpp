#include "kernels.h"

#include <algorithm>

#include "../../../select_kernel.h"

namespace flash_attn::cuda::sm80::fp32 {

const Kernels& Kernels::allowed(const ForwardParams& p) const {
  const bool fits = reduced != nullptr && std::max(p.head_dim, p.head_dim_v) <= reduced->max_head_dim();
  return fits && allows_reduced_float32() ? *reduced : *this;
}

namespace {

const Kernels kReduced = {
    "sm80", "mma fp32 ", "of numbers rounded to fp16", {&kReducedForwardD64}, {&kReducedBackwardD64}, nullptr};

}  // namespace

extern const Kernels kMmaKernels = {
    "sm80", "mma fp32 ", "of pairs of fp16", {&kForwardD32, &kForwardD64}, {&kBackwardD32, &kBackwardD64}, &kReduced};

}  // namespace flash_attn::cuda::sm80::fp32
