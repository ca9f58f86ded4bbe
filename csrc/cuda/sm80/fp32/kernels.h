// The kernels for float32 that a family has: those of sm80/ with mma.sync, those of sm90/ with wgmma. What they plan
// and launch is the same.
#pragma once

#include "backward/variant.h"
#include "forward/variant.h"

namespace flash_attn::cuda::sm80::fp32 {

struct Kernels {
  static constexpr int kHeadDims = 2;
  const char* family;
  const char* prefix;  // of the kernels' names
  // By the head dimension that they are for.
  const ForwardVariants* forward[kHeadDims];
  const BackwardVariants* backward[kHeadDims];

  int64_t max_head_dim() const { return forward[kHeadDims - 1]->begin()->head_dim; }
};

extern const Kernels kMmaKernels, kWgmmaKernels;

/// Those of the least head dimension of at least `columns`, or of the largest.
template <typename Variants>
const Variants& variants_for(const Variants* const (&all)[Kernels::kHeadDims], int64_t columns) {
  return columns <= all[0]->begin()->head_dim ? *all[0] : *all[1];
}

}  // namespace flash_attn::cuda::sm80::fp32
