// The family's entries: what it refuses, and what it plans.
#include "../refusals.h"
#include "../sm80.h"
#include "launch.h"
#include "plan.h"

namespace flash_attn::cuda::sm80 {
namespace {

const char* refuses(const ForwardParams& p, const DeviceInfo& device) {
  if (const char* reason = refuses_problem(p, device, FLASH_ATTN_SM80_ARCHS)) return reason;
  if (double(p.batch) * double(p.num_heads) * (double(p.seqlen_q) / 64 + 1) >= kMaxTiles) {
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
  if (chosen.packs_mask) plan.decide("mask", p.mask.packed != nullptr ? "prepared" : "packed first");
  if (!chosen.aligned) plan.decide("loads", "by element");
  return plan;
}

}  // namespace

extern const ForwardKernel kForward = {"sm80", refuses, plan, launch_forward};

}  // namespace flash_attn::cuda::sm80
