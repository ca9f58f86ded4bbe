// From a plan to launches.
#pragma once

#include "plan.h"

namespace flash_attn::cuda::sm90::backward {

/// Of scratch memory that launch_plan() uses.
int64_t workspace_bytes(const Plan& plan, const BackwardParams& params);
/// All launches of the pass: before, of and after the main kernel.
void launch_plan(const Plan& plan, const BackwardParams& params, cudaStream_t stream);

}  // namespace flash_attn::cuda::sm90::backward
