// Makes table entries of kernel configurations; for the files of instances/ alone.
#pragma once

#include "all_gradients.h"
#include "variant.h"

namespace flash_attn::cuda::sm80::fp32 {

template <typename Config>
BackwardVariant backward_variant_of(const char* name, int gradients, void (*kernel)(const BackwardKernelParams)) {
  return {name,      Config::kHeadDim,  Config::kBlockM,      Config::kBlockN, Config::kThreads,
          gradients, Config::kExtended, Config::kSharedBytes, kernel};
}
/// Block: BackwardBlock<Config>, or what is built on it.
template <typename Config, typename Block>
BackwardVariant backward_variant_of(const char* name, int gradients = Config::kGradients) {
  return backward_variant_of<Config>(name, gradients, backward_kernel<Config, Block>);
}

template <int kHeadDim, int kWarps, int kMTiles, int kBlockN, int kSumSteps, int kStages, int kBlocksPerSm,
          int kGradients, bool kExtended, typename Products = MmaProducts<false>>
BackwardVariant backward_variant(const char* name) {
  using Config = BackwardConfig<kHeadDim, kWarps, kMTiles, kBlockN, kSumSteps, kStages, kBlocksPerSm, kGradients,
                                kExtended, Products>;
  return backward_variant_of<Config, BackwardBlock<Config>>(name);
}

/// All gradients in one kernel.
template <int kHeadDim, int kBlockN, int kBlocksPerSm, bool kExtended, typename Products = MmaProducts<false>>
BackwardVariant variant_of_all(const char* name) {
  using Config =
      AllGradientsConfig<BackwardConfig<kHeadDim, 4, 1, kBlockN, 2, 2, kBlocksPerSm, kDk | kDv, kExtended, Products>>;
  return backward_variant_of<Config, AllGradientsBlock<Config>>(name, kDq | kDk | kDv);
}

}  // namespace flash_attn::cuda::sm80::fp32
