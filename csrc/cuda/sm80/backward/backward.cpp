// The family's backward entry: what it takes, its plan, its launch.
#include "../fp32/backward/plan.h"
#include "../fp32/forward/plan.h"
#include "../refusals.h"
#include "../sm80.h"
#include "plan.h"

namespace flash_attn::cuda::sm80 {
namespace {

constexpr const char* kNoKernel = "no kernel of this head dimension does what is asked for";

const char* refuses(const BackwardParams& params, const DeviceInfo& device) {
  const ForwardParams& p = params.forward;
  if (const char* reason = refuses_problem(p, device, FLASH_ATTN_SM80_ARCHS)) return reason;
  if (const char* reason = refuses_backward_tiles(p)) return reason;
  if (p.dtype == DType::kFloat32) {
    if (const char* reason = fp32::refuses(p, device, fp32::kMmaKernels)) return reason;
    return fp32::plan_backward(params, device, fp32::kMmaKernels).kernels[0] == nullptr ? kNoKernel : nullptr;
  }
  if (plan_backward(params, device).variant == nullptr) return kNoKernel;
  return nullptr;
}

Plan plan(const BackwardParams& params, const DeviceInfo& device) {
  if (params.forward.dtype == DType::kFloat32)
    return fp32::describe(fp32::plan_backward(params, device, fp32::kMmaKernels));
  const BackwardPlan chosen = plan_backward(params, device);
  Plan plan{chosen.variant->name, chosen.variant->block_m, chosen.variant->block_n, chosen.workspace_bytes};
  if (chosen.parts > 1) plan.decide("parts", chosen.parts);
  if (chosen.row_shares() > 1) plan.decide("row_shares", chosen.row_shares());
  if (chosen.ordered) plan.decide("dq", "added in a fixed order");
  if (chosen.spread > 0) plan.decide("spread", chosen.spread);
  if (chosen.packs_mask) plan.decide("mask", params.forward.mask.packed != nullptr ? "prepared" : "packed first");
  if (!chosen.aligned) plan.decide("loads", "by element");
  return plan;
}

void launch(const BackwardParams& params, const DeviceInfo& device, void* stream) {
  if (params.forward.dtype == DType::kFloat32) {
    return fp32::launch_backward(params, fp32::plan_backward(params, device, fp32::kMmaKernels), device, stream);
  }
  launch_backward(plan_backward(params, device), params, static_cast<cudaStream_t>(stream));
}

}  // namespace

extern const BackwardKernel kBackward = {"sm80", refuses, plan, launch};

}  // namespace flash_attn::cuda::sm80
