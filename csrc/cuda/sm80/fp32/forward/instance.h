// Makes table entries of kernel configurations; for the files of instances/ alone.
#pragma once

#include "kernel.h"
#include "variant.h"

namespace flash_attn::cuda::sm80::fp32 {

template <typename Config>
ForwardVariant forward_variant_of(const char* name, int least_slots, void (*kernel)(const ForwardKernelParams),
                                  int least_columns = 0) {
  constexpr int kAlignment = Config::Products::kAlignment;
  return {name,
          Config::kHeadDim,
          Config::kBlockM,
          Config::kBlockN,
          Config::kThreads,
          Config::kBlocksPerSm,
          Config::kExtended,
          Config::kQueryBytes + (kAlignment > 128 ? kAlignment : 0),
          Config::kSlotBytes,
          least_slots,
          least_columns,
          kernel};
}
/// Block: ForwardBlock<Config>, or what is built on it.
template <typename Config, typename Block>
ForwardVariant forward_variant_of(const char* name) {
  return forward_variant_of<Config>(name, Block::kLeastSlots, forward_kernel<Config, Block>);
}

template <int kHeadDim, int kWarps, int kMTiles, int kBlockN, int kSumSteps, int kBlocksPerSm, bool kExtended,
          typename Products = MmaProducts<false>>
ForwardVariant forward_variant(const char* name) {
  using Config = ForwardConfig<kHeadDim, kWarps, kMTiles, kBlockN, kSumSteps, kBlocksPerSm, kExtended, Products>;
  return forward_variant_of<Config, ForwardBlock<Config>>(name);
}

}  // namespace flash_attn::cuda::sm80::fp32
