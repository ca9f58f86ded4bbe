// The kernels for float32 that a family has: this one with mma.sync, sm90/fp32 by warpgroups. What they plan and launch
// is the same.
#pragma once

#include "backward/variant.h"
#include "forward/variant.h"

namespace flash_attn::cuda::sm80::fp32 {

struct Kernels {
  static constexpr int kHeadDims = 4;
  const char* family;
  const char* prefix;    // of the kernels' names
  const char* products;  // for people
  // By the head dimension that they are for, behind them null.
  const ForwardVariants* forward[kHeadDims];
  const BackwardVariants* backward[kHeadDims];
  const Kernels* reduced;  // the same with one product of numbers rounded to fp16; null: these are

  int64_t max_head_dim() const;
  /// These, or the reduced ones where they are allowed and take the head dimension.
  const Kernels& allowed(const ForwardParams& p) const;
};

extern const Kernels kMmaKernels;

/// Those of the least head dimension of at least `columns`, or of the largest.
template <typename Variants>
const Variants& variants_for(const Variants* const (&all)[Kernels::kHeadDims], int64_t columns) {
  int i = 0;
  while (i + 1 < Kernels::kHeadDims && all[i + 1] != nullptr && columns > all[i]->begin()->head_dim) ++i;
  return *all[i];
}

inline int64_t Kernels::max_head_dim() const {
  int64_t columns = 0;
  for (const ForwardVariants* variants : forward) columns = variants != nullptr ? variants->begin()->head_dim : columns;
  return columns;
}

}  // namespace flash_attn::cuda::sm80::fp32
