// From a compiled configuration to a BackwardVariant. Only instantiation files include this.
#pragma once

#include "backward_kernel.h"
#include "backward_plan.h"
#include "launch.h"

namespace flash_attn::sm90 {

template <typename Config>
void launch_backward_kernel(const BackwardKernelParams& params, int grid, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(BackwardStorage<Config>);
  static_assert(kSharedBytes <= 232448, "a CTA's shared memory on compute capability 9.0");
  const auto kernel = backward_kernel<Config>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "shared memory");
  launch_dependent(kernel, dim3(grid), Config::kThreads, kSharedBytes, stream, params, "backward");
}

template <typename Shape, bool kRowParts>
constexpr BackwardLaunch kLaunchBackward = {launch_backward_kernel<BackwardConfig<__nv_bfloat16, Shape, kRowParts>>,
                                            launch_backward_kernel<BackwardConfig<__half, Shape, kRowParts>>};

template <typename Shape>
constexpr BackwardVariant backward_variant(const char* name) {
  using Config = BackwardConfig<__nv_bfloat16, Shape>;
  BackwardVariant variant{};
  variant.name = name;
  variant.head_dim = variant.head_dim_v = Config::kHeadDim;
  variant.dq_columns = 64 * Config::kPanels;
  variant.block_m = Config::kBlockM;
  variant.block_n = variant.map_rows = Config::kBlockN;
  variant.cluster = 1;
  variant.dq_warp = Config::kDqWarp;
  variant.fused_dq = Config::kFusedDq;
  variant.descends = Config::kDescends;
  variant.launch = kLaunchBackward<Shape, false>;
  if constexpr (!Config::kFusedDq) variant.launch_row_parts = kLaunchBackward<Shape, true>;
  return variant;
}

}  // namespace flash_attn::sm90
