// From a compiled configuration to a Variant. Only instantiation files include this.
#pragma once

#include "../../../common/launch.h"
#include "../../hopper/budgets.h"
#include "../single/variant.h"
#include "kernel.h"

namespace flash_attn::cuda::sm90::backward::extended {

template <typename Config>
void launch_kernel(const KernelParams& params, int grid, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
  static_assert(kSharedBytes <= kMaxSharedBytes, "the tiles do not fit");
  const auto kernel = backward_kernel<Config>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "sm90 shared memory");
  launch_dependent(kernel, dim3(grid), Config::kThreads, kSharedBytes, stream, params, "sm90 extended backward");
}

template <typename Shape>
constexpr Variant make_variant(const char* name) {
  using Config = ExtendedConfig<__nv_bfloat16, Shape>;
  Variant variant = single::variant_of<Config>(name);
  variant.extended = true;
  variant.many_registers = Config::kManyRegisters;
  variant.launch = {launch_kernel<ExtendedConfig<__nv_bfloat16, Shape>>, launch_kernel<ExtendedConfig<__half, Shape>>};
  return variant;
}

}  // namespace flash_attn::cuda::sm90::backward::extended
