// The family's entries: kernels for 16 bits, and those for float32.
#include "fp32/fp32.h"
#include "sm90.h"

namespace flash_attn::cuda::sm90 {
namespace {

const ForwardKernel& kernel_for(const ForwardParams& p) {
  return p.dtype == DType::kFloat32 ? fp32::kForward : forward::kKernel;
}
const BackwardKernel& kernel_for(const BackwardParams& params) {
  return params.forward.dtype == DType::kFloat32 ? fp32::kBackward : backward::kKernel;
}

template <typename Params>
constexpr Kernel<Params> kFamily = {
    "sm90", [](const Params& params, const DeviceInfo& device) { return kernel_for(params).refuses(params, device); },
    [](const Params& params, const DeviceInfo& device) { return kernel_for(params).plan(params, device); },
    [](const Params& params, const DeviceInfo& device, void* stream) {
      kernel_for(params).launch(params, device, stream);
    }};

}  // namespace

extern const ForwardKernel kForward = kFamily<ForwardParams>;
extern const BackwardKernel kBackward = kFamily<BackwardParams>;

}  // namespace flash_attn::cuda::sm90
