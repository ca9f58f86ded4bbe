// Makes table entries of kernel configurations; for the files that list them alone.
#pragma once

#include "../../sm80/fp32/backward/instance.h"
#include "../../sm80/fp32/forward/instance.h"
#include "all_gradients.h"
#include "backward_turns.h"
#include "forward_turns.h"
#include "kernels.h"
#include "products.h"

namespace flash_attn::cuda::sm90::fp32 {

using sm80::fp32::kDk, sm80::fp32::kDq, sm80::fp32::kDv;

// Of head dims 64 and 128, where dK and dV fit in registers together. kReduced: of numbers rounded to fp16.
template <bool kReduced, int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, bool kExtended>
using ForwardConfig = sm80::fp32::ForwardConfig<kHeadDim, kWarps, 1, kBlockN, kHeadDim / 32, kBlocksPerSm, kExtended,
                                                WarpgroupProducts<kReduced>>;

template <bool kReduced, int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, bool kExtended>
ForwardVariant forward_variant(const char* name) {
  using C = ForwardConfig<kReduced, kHeadDim, kWarps, kBlockN, kBlocksPerSm, kExtended>;
  return sm80::fp32::forward_variant_of<C, sm80::fp32::ForwardBlock<C>>(name);
}
/// From where on the larger blocks of head dim 64 are faster than those of 64 rows, which fill the GPU better.
constexpr int kManyColumns = 1024;

/// Of kWarps / 4 warpgroups that take turns, beside one that loads.
template <bool kReduced, int kHeadDim, int kWarps, int kBlockN, bool kExtended>
ForwardVariant in_turns(const char* name, int least_columns = 0) {
  using C = TurnsConfig<ForwardConfig<kReduced, kHeadDim, kWarps, kBlockN, 1, kExtended>>;
  return sm80::fp32::forward_variant_of<C>(name, C::kSlots, forward_turns_kernel<C>, least_columns);
}

template <bool kReduced, int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, int kGradients, bool kExtended>
using BackwardConfig = sm80::fp32::BackwardConfig<kHeadDim, kWarps, 1, kBlockN, kHeadDim / 32, 2, kBlocksPerSm,
                                                  kGradients, kExtended, WarpgroupProducts<kReduced>>;

template <bool kReduced, int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, int kGradients, bool kExtended>
BackwardVariant backward_variant(const char* name) {
  using C = BackwardConfig<kReduced, kHeadDim, kWarps, kBlockN, kBlocksPerSm, kGradients, kExtended>;
  return sm80::fp32::backward_variant_of<C, sm80::fp32::BackwardBlock<C>>(name);
}
/// All gradients in one kernel, by warpgroups that take turns.
template <bool kReduced, int kHeadDim, int kBlockN, bool kExtended>
BackwardVariant all_in_turns(const char* name) {
  using C = BackwardTurnsConfig<
      BackwardConfig<kReduced, kHeadDim, 8, kBlockN, 1, sm80::fp32::kDk | sm80::fp32::kDv, kExtended>>;
  return sm80::fp32::backward_variant_of<C>(name, kDq | kDk | kDv, backward_turns_kernel<C>);
}
/// All gradients in one kernel.
template <bool kReduced, int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, bool kExtended>
BackwardVariant variant_of_all(const char* name) {
  using C = GradientsConfig<
      BackwardConfig<kReduced, kHeadDim, kWarps, kBlockN, kBlocksPerSm, sm80::fp32::kDk | sm80::fp32::kDv, kExtended>>;
  return sm80::fp32::backward_variant_of<C, GradientsBlock<C>>(name, kDq | kDk | kDv);
}

}  // namespace flash_attn::cuda::sm90::fp32
