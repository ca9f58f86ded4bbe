// Makes table entries of kernel configurations; for the files that list them alone.
#pragma once

#include "../../sm80/fp32/backward/instance.h"
#include "../../sm80/fp32/forward/instance.h"
#include "all_gradients.h"
#include "forward_block.h"
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
template <bool kReduced, int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, bool kExtended>
ForwardVariant pipelined(const char* name) {
  using C = ForwardConfig<kReduced, kHeadDim, kWarps, kBlockN, kBlocksPerSm, kExtended>;
  return sm80::fp32::forward_variant_of<C, PipelinedBlock<C>>(name);
}

template <bool kReduced, int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, int kGradients, bool kExtended>
using BackwardConfig = sm80::fp32::BackwardConfig<kHeadDim, kWarps, 1, kBlockN, kHeadDim / 32, 2, kBlocksPerSm,
                                                  kGradients, kExtended, WarpgroupProducts<kReduced>>;

template <bool kReduced, int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, int kGradients, bool kExtended>
BackwardVariant backward_variant(const char* name) {
  using C = BackwardConfig<kReduced, kHeadDim, kWarps, kBlockN, kBlocksPerSm, kGradients, kExtended>;
  return sm80::fp32::backward_variant_of<C, sm80::fp32::BackwardBlock<C>>(name);
}
/// All gradients in one kernel.
template <bool kReduced, int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, bool kExtended>
BackwardVariant variant_of_all(const char* name) {
  using C = GradientsConfig<
      BackwardConfig<kReduced, kHeadDim, kWarps, kBlockN, kBlocksPerSm, sm80::fp32::kDk | sm80::fp32::kDv, kExtended>>;
  return sm80::fp32::backward_variant_of<C, GradientsBlock<C>>(name, kDq | kDk | kDv);
}

}  // namespace flash_attn::cuda::sm90::fp32
