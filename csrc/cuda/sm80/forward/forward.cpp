// The family's entries: what it refuses, and what it plans.
#include "../fp32/forward/plan.h"
#include "../refusals.h"
#include "../sm80.h"
#include "launch.h"
#include "plan.h"

namespace flash_attn::cuda::sm80 {
namespace {

constexpr const char* kNoKernel = "no kernel of this head dimension does what is asked for";

const char* refuses(const ForwardParams& p, const DeviceInfo& device) {
  if (const char* reason = refuses_problem(p, device, FLASH_ATTN_SM80_ARCHS)) return reason;
  if (const char* reason = refuses_forward_tiles(p)) return reason;
  if (p.dtype == DType::kFloat32) {
    if (const char* reason = fp32::refuses(p, device, fp32::kMmaKernels)) return reason;
    return fp32::plan_forward(p, device, fp32::kMmaKernels).variant == nullptr ? kNoKernel : nullptr;
  }
  if (plan_forward(p, device).variant == nullptr) return kNoKernel;
  return nullptr;
}

Plan plan(const ForwardParams& p, const DeviceInfo& device) {
  if (p.dtype == DType::kFloat32) return fp32::describe(fp32::plan_forward(p, device, fp32::kMmaKernels));
  const ForwardPlan chosen = plan_forward(p, device);
  Plan plan{chosen.variant->name, chosen.variant->block_m, chosen.variant->block_n, chosen.workspace_bytes};
  plan.decide("blocks_per_sm", chosen.blocks_per_sm);
  if (chosen.is_split()) plan.decide("splits", chosen.schedule.num_splits);
  if (chosen.packs_mask) plan.decide("mask", p.mask.packed != nullptr ? "prepared" : "packed first");
  if (!chosen.aligned) plan.decide("loads", "by element");
  return plan;
}

void launch(const ForwardParams& p, const DeviceInfo& device, void* stream) {
  if (p.dtype == DType::kFloat32) {
    return fp32::launch_forward(p, fp32::plan_forward(p, device, fp32::kMmaKernels), device, stream);
  }
  launch_forward(p, device, stream);
}

}  // namespace

extern const ForwardKernel kForward = {"sm80", refuses, plan, launch};

}  // namespace flash_attn::cuda::sm80
