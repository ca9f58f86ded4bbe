// What the backward pass does row by row after the main kernel, where that has not done it itself: dq from dq_accum, dk
// and dv from their parts.
#pragma once

#include <cuda_runtime_api.h>

#include "../preprocess/preprocess.h"

namespace flash_attn::cuda::sm90::backward {

/// What a key head's tiles have stored of dk and dv, (rows of k, num_heads_k * num_parts, columns): see
/// SplitPlan::stored().
struct PartsParams {
  BackwardParams problem;
  TensorView dk_parts, dv_parts;
  int num_parts;
};

/// Adds them up, in order.
void launch_add_parts(const PartsParams& params, const mask::KindCondition& condition, cudaStream_t stream);

/// dq = dq_scale * dq_accum.
void launch_convert_dq(const RowsParams& params, cudaStream_t stream);

}  // namespace flash_attn::cuda::sm90::backward
