// From a compiled configuration to a Variant. Only instantiation files include this.
#pragma once

#include "../launch_kernel.h"
#include "../single/variant.h"
#include "kernel.h"

namespace flash_attn::cuda::sm90::backward::extended {

template <typename Config>
constexpr auto kLaunchKernel =
    launch_kernel<backward_kernel<Config>, Config::kThreads, int{sizeof(SharedStorage<Config>)}>;

template <typename Shape, bool kTakesBias = true>
constexpr Variant make_variant(const char* name) {
  using Config = ExtendedConfig<__nv_bfloat16, Shape, kTakesBias>;
  Variant variant = single::variant_of<Config>(name);
  variant.extended = true;
  variant.takes_bias = kTakesBias;
  variant.many_registers = Config::kManyRegisters;
  variant.launch = {kLaunchKernel<Config>, kLaunchKernel<ExtendedConfig<__half, Shape, kTakesBias>>};
  return variant;
}

}  // namespace flash_attn::cuda::sm90::backward::extended
