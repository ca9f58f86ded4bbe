// The pass that makes pairs of float32 tensors.
#pragma once

#include <cuda_runtime_api.h>

#include "planes.h"

namespace flash_attn::cuda::sm80::fp32 {

struct SplitSource {
  TensorView view;  // float32
  Planes planes;
  int columns;       // of the tensor
  bool queries;      // its rows are those of q
  bool tests_range;  // see split()
};

constexpr int kMaxSources = 4;

/// Fills planes of all sources, whose planes have as many columns each, and for each (batch, KV head) `flags`: not 0
/// where pairs do not hold what is there, which the universal kernels compute then. That is so
/// - where something is not finite: a split would make NaN of it, and 0 times that;
/// - where a tile's largest entry is outside of 2^-86 to 2^59: products of two such sums are floats;
/// - of sources that test it, where a row or a column of a tile, if it is not zero, is nowhere above 2^-16 of the
/// tile's
///   largest entry: what P or dS multiplies it by may be as much above that of others, and its pair has fewer bits.
void split(const ForwardParams& problem, const SplitSource* sources, int count, int* flags, cudaStream_t stream);

}  // namespace flash_attn::cuda::sm80::fp32
