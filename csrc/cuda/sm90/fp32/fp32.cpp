// float32 in the Hopper family, as pairs of fp16: the plans and launches of sm80/fp32, with kernels whose products are
// those of warpgroups.
#include "fp32.h"

#include "../../sm80/fp32/backward/plan.h"
#include "../../sm80/fp32/forward/plan.h"
#include "../../sm80/refusals.h"
#include "kernels.h"

namespace flash_attn::cuda::sm90::fp32 {
namespace {

constexpr const char* kNoKernel = "no float32 kernel of this head dimension does what is asked for";

const char* refuses(const ForwardParams& p, const DeviceInfo& device) {
  if (device.compute_capability != 90) return "the device is not of compute capability 9.0";
  if (const char* reason = sm80::refuses_problem(p, device, "90-real")) return reason;
  if (const char* reason = sm80::refuses_forward_tiles(p)) return reason;
  if (const char* reason = sm80::fp32::refuses(p, device, kKernels)) return reason;
  return sm80::fp32::plan_forward(p, device, kKernels).variant == nullptr ? kNoKernel : nullptr;
}

const char* refuses_backward(const BackwardParams& params, const DeviceInfo& device) {
  const ForwardParams& p = params.forward;
  if (const char* reason = refuses(p, device)) return reason;
  if (const char* reason = sm80::refuses_backward_tiles(p)) return reason;
  return sm80::fp32::plan_backward(params, device, kKernels).kernels[0] == nullptr ? kNoKernel : nullptr;
}

flash_attn::Plan plan(const ForwardParams& p, const DeviceInfo& device) {
  return describe(sm80::fp32::plan_forward(p, device, kKernels));
}

flash_attn::Plan plan_of_backward(const BackwardParams& params, const DeviceInfo& device) {
  return describe(sm80::fp32::plan_backward(params, device, kKernels));
}

void launch(const ForwardParams& p, const DeviceInfo& device, void* stream) {
  sm80::fp32::launch_forward(p, sm80::fp32::plan_forward(p, device, kKernels), device, stream);
}

void launch_of_backward(const BackwardParams& params, const DeviceInfo& device, void* stream) {
  sm80::fp32::launch_backward(params, sm80::fp32::plan_backward(params, device, kKernels), device, stream);
}

}  // namespace

extern const ForwardKernel kForward = {"sm90", refuses, plan, launch};
extern const BackwardKernel kBackward = {"sm90", refuses_backward, plan_of_backward, launch_of_backward};

}  // namespace flash_attn::cuda::sm90::fp32
