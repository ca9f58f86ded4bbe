// float32 in the Hopper family, as pairs of fp16: the plans and launches of sm80/fp32, with kernels whose products are
// those of warpgroups.
#include "fp32.h"

#include "../../sm80/fp32/backward/plan.h"
#include "../../sm80/fp32/forward/plan.h"
#include "../../sm80/refusals.h"

namespace flash_attn::cuda::sm90::fp32 {
namespace {

using namespace sm80::fp32;

constexpr const char* kNoKernel = "no float32 kernel of this head dimension does what is asked for";

}  // namespace

const char* refuses(const ForwardParams& p, const DeviceInfo& device) {
  if (device.compute_capability != 90) return "the device is not of compute capability 9.0";
  if (const char* reason = sm80::refuses_problem(p, device, "90-real")) return reason;
  if (const char* reason = sm80::refuses_forward_tiles(p)) return reason;
  if (const char* reason = refuses(p, device, kWgmmaKernels)) return reason;
  return plan_forward(p, device, kWgmmaKernels).variant == nullptr ? kNoKernel : nullptr;
}

const char* refuses(const BackwardParams& params, const DeviceInfo& device) {
  const ForwardParams& p = params.forward;
  if (const char* reason = refuses(p, device)) return reason;
  if (const char* reason = sm80::refuses_backward_tiles(p)) return reason;
  return plan_backward(params, device, kWgmmaKernels).of_queries == nullptr ? kNoKernel : nullptr;
}

flash_attn::Plan plan(const ForwardParams& p, const DeviceInfo& device) {
  return describe(plan_forward(p, device, kWgmmaKernels));
}

flash_attn::Plan plan(const BackwardParams& params, const DeviceInfo& device) {
  return describe(plan_backward(params, device, kWgmmaKernels));
}

void launch(const ForwardParams& p, const DeviceInfo& device, void* stream) {
  launch_forward(p, plan_forward(p, device, kWgmmaKernels), stream);
}

void launch(const BackwardParams& params, const DeviceInfo& device, void* stream) {
  launch_backward(params, plan_backward(params, device, kWgmmaKernels), stream);
}

}  // namespace flash_attn::cuda::sm90::fp32
