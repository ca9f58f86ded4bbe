// From a compiled configuration of two CTAs with rules of scores to a Variant. Only instantiation files include this.
#pragma once

#include "../launch_kernel.h"
#include "../pair/variant.h"
#include "kernel.h"

namespace flash_attn::cuda::sm90::backward::extended_pair {

template <typename Config>
constexpr auto kLaunchKernel =
    launch_kernel<backward_kernel<Config>, Config::kThreads, int{sizeof(pair::SharedStorage<Config>)}>;

template <int kHeadDim, int kHeadDimV, bool kStoresDmask = false>
constexpr Variant make_variant(const char* name) {
  using Bf16 = ExtendedConfig<__nv_bfloat16, kHeadDim, kHeadDimV, kStoresDmask>;
  Variant variant = pair::variant_of<Bf16>(name);
  variant.extended = true;
  variant.takes_bias = Bf16::kTakesBias;
  variant.many_registers = Bf16::kManyRegisters;
  variant.launch = {kLaunchKernel<Bf16>, kLaunchKernel<ExtendedConfig<__half, kHeadDim, kHeadDimV, kStoresDmask>>};
  return variant;
}

}  // namespace flash_attn::cuda::sm90::backward::extended_pair
