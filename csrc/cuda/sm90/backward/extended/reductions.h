// Gradients of ALiBi's slopes and of sinks, from what the main kernel and the preprocess leave.
#pragma once

#include <cuda_runtime_api.h>

#include "../preprocess/preprocess.h"

namespace flash_attn::cuda::sm90::backward {

struct SlopeSums {
  const float* sums;  // (batch, query heads, blocks), see ExtendedParams::slope_sums
  int64_t blocks;     // numbers of a head
};

/// dslopes: - sum of dS times distance over a head, of one sequence or of all.
void reduce_slopes(const BackwardParams& problem, const SlopeSums& sums, cudaStream_t stream);
/// dsinks: - sum of P_sink * delta over all rows of a head.
void reduce_sinks(const RowsParams& rows, cudaStream_t stream);

}  // namespace flash_attn::cuda::sm90::backward
