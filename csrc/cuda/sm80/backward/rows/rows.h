// Work on rows before and after the kernels on tiles.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"

namespace flash_attn::cuda::sm80 {

/// Fills minus_lse and minus_delta, clears dq_accum and turns, and clears gradients of rows outside of packed
/// sequences. `warps`: of the kernel on tiles.
void prepare_rows(const BackwardKernelParams& params, int warps, cudaStream_t stream);

/// dq from dq_accum.
void store_dq(const BackwardKernelParams& params, cudaStream_t stream);

/// dk and dv of so many blocks of keys from dk_parts and dv_parts.
void store_keys(const BackwardKernelParams& params, int64_t blocks, cudaStream_t stream);

/// dsinks: - sum of P_sink * delta over all rows of a head.
void reduce_sinks(const BackwardKernelParams& params, cudaStream_t stream);

/// dslopes from slope_sums.
void reduce_slopes(const BackwardKernelParams& params, int warps, cudaStream_t stream);

}  // namespace flash_attn::cuda::sm80
