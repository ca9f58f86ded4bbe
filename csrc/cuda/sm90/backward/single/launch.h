// From a compiled configuration to a Variant. Only instantiation files include this.
#pragma once

#include "../../../common/launch.h"
#include "../../hopper/budgets.h"
#include "kernel.h"
#include "variant.h"

namespace flash_attn::cuda::sm90::backward::single {

template <typename Config>
void launch_kernel(const KernelParams& params, int grid, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
  static_assert(kSharedBytes <= kMaxSharedBytes, "the tiles do not fit");
  const auto kernel = backward_kernel<Config>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "sm90 shared memory");
  launch_dependent(kernel, dim3(grid), Config::kThreads, kSharedBytes, stream, params, "sm90 backward");
}

template <typename Shape, bool kRowParts>
constexpr Launch kLaunch = {launch_kernel<KernelConfig<__nv_bfloat16, Shape, kRowParts>>,
                            launch_kernel<KernelConfig<__half, Shape, kRowParts>>};

template <typename Shape>
constexpr Variant make_variant(const char* name) {
  using Config = KernelConfig<__nv_bfloat16, Shape>;
  Variant variant = variant_of<Config>(name);
  variant.launch = kLaunch<Shape, false>;
  if constexpr (Config::kDqPath != DqPath::kOneCta) variant.launch_row_parts = kLaunch<Shape, true>;
  return variant;
}

}  // namespace flash_attn::cuda::sm90::backward::single
