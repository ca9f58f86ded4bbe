// From a plan to launches.
#pragma once

#include "plan.h"

namespace flash_attn::cuda::sm90::backward {

/// What is launched for a problem: one plan, or up to three of which the device takes one, when it has found out
/// whether attn_mask is a band, or an additive one that only hides.
struct Plans {
  Plan plan;
  Plan of_band, of_bits;  // without a variant: there is none

  bool has_band() const { return of_band.variant != nullptr; }
  bool has_bits() const { return of_bits.variant != nullptr; }
  bool depend_on_kind() const { return has_band() || has_bits(); }
};
Plans choose_plans(const BackwardParams& params, const DeviceInfo& device);

/// Where a kernel of extended/ has it from what attn_mask shows.
enum class MaskSource {
  kTiles,   // they read an additive mask where it lies, or there is none
  kPacked,  // it is packed first, or was before: classes of tiles are made from that
  kBytes,   // a small boolean mask: the launch that prepares rows makes classes from it as it lies
};
MaskSource mask_source(const ExtendedPlan& plan, const ForwardParams& p);

/// Of scratch memory that launch_plans() uses.
int64_t workspace_bytes(const Plans& plans, const BackwardParams& params);
/// All launches of the pass: before, of and after the main kernels.
void launch_plans(const Plans& plans, const BackwardParams& params, const DeviceInfo& device, cudaStream_t stream);

/// The problem of which the gradient of a broadcast attn_mask is all that is wanted: the sm80 family's kernel adds it
/// up.
BackwardParams of_dmask_alone(const BackwardParams& params);

}  // namespace flash_attn::cuda::sm90::backward
