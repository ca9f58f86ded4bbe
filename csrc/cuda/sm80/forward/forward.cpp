// The family's entries: what it refuses, and what it plans.
#include "../code_for_device.h"
#include "../sm80.h"
#include "launch.h"
#include "plan.h"

namespace flash_attn::cuda::sm80 {
namespace {

constexpr int64_t kMaxRows = int64_t{1} << 27;  // so that places and differences of rows stay in 32 bits

const char* refuses(const ForwardParams& p, const DeviceInfo& device) {
  if (device.compute_capability < 80) return "the device is older than compute capability 8.0";
  if (!has_code_for(device.compute_capability, FLASH_ATTN_SM80_ARCHS)) {
    return "this build has no code of the family for the device's compute capability";
  }
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) return "the dtype is neither bfloat16 nor float16";
  if (p.head_dim > 256 || p.head_dim_v > 256) return "head_dim is over 256";
  if (p.seqlen_q >= kMaxRows || p.seqlen_k >= kMaxRows) return "a sequence is of over 2^27 rows";
  if (double(p.batch) * double(p.num_heads) * (double(p.seqlen_q) / 64 + 1) >= double(1 << 30)) {
    return "there are over 2^30 tiles";
  }
  if (plan_forward(p, device).variant == nullptr) return "no kernel of this head dimension fits into shared memory";
  return nullptr;
}

Plan plan(const ForwardParams& p, const DeviceInfo& device) {
  const ForwardPlan chosen = plan_forward(p, device);
  Plan plan{chosen.variant->name, chosen.variant->block_m, chosen.variant->block_n, chosen.workspace_bytes};
  plan.decide("blocks_per_sm", chosen.blocks_per_sm);
  plan.decide("slots", chosen.slots);
  if (chosen.packs_mask) plan.decide("mask", "packed first");
  if (!chosen.aligned) plan.decide("loads", "by element");
  return plan;
}

}  // namespace

extern const ForwardKernel kForward = {"sm80", refuses, plan, launch_forward};

}  // namespace flash_attn::cuda::sm80
