// From a plan to launches.
#pragma once

#include "plan.h"

namespace flash_attn::cuda::sm90::backward {

/// Of scratch memory that launch_plan() uses.
int64_t workspace_bytes(const Plan& plan, const BackwardParams& params);
/// All launches of the pass: before, of and after the main kernel.
void launch_plan(const Plan& plan, const BackwardParams& params, const DeviceInfo& device, cudaStream_t stream);

/// The problem of which the gradient of a broadcast attn_mask is all that is wanted: the sm80 family's kernel adds it
/// up.
BackwardParams of_dmask_alone(const BackwardParams& params);

}  // namespace flash_attn::cuda::sm90::backward
