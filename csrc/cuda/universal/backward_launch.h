// Between the backward pass's entry and its instances.
#pragma once

#include <cuda_runtime_api.h>

#include "extended.h"

namespace flash_attn::cuda::universal {

/// dq (and the rows' share of dslopes), dk and dv. T: double, float, __nv_bfloat16, __half. Instantiated in
/// backward_*.cu. `flags` as in launch_forward().
template <typename T>
void launch_backward(const BackwardParams& params, const int* flags, cudaStream_t stream);

/// dmask; with `flags` the share of the flagged heads is added to it.
template <typename T>
void launch_mask_gradient(const BackwardParams& params, const int* flags, cudaStream_t stream);

/// Columns of a gradient that a block holds.
inline int backward_bucket(const ForwardParams& p) {
  return p.head_dim <= 16 && p.head_dim_v <= 16 && !is_extended(p) ? 16 : 64;
}

}  // namespace flash_attn::cuda::universal
