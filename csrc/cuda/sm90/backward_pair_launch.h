// From a compiled configuration of two CTAs to a BackwardVariant. Only instantiation files include this.
#pragma once

#include "backward_pair_kernel.h"
#include "backward_plan.h"
#include "launch.h"

namespace flash_attn::sm90 {

template <typename Config>
void launch_backward_pair_kernel(const BackwardKernelParams& params, int grid, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(BackwardPairStorage<Config>);
  static_assert(kSharedBytes <= 232448, "a CTA's shared memory on compute capability 9.0");
  const auto kernel = backward_pair_kernel<Config>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "shared memory");
  launch_dependent(kernel, dim3(grid), Config::kThreads, kSharedBytes, stream, params, "backward");
}

template <int kHeadDim, int kHeadDimV, bool kRowParts>
constexpr BackwardLaunch kLaunchBackwardPair = {
    launch_backward_pair_kernel<BackwardPairConfig<__nv_bfloat16, kHeadDim, kHeadDimV, kRowParts>>,
    launch_backward_pair_kernel<BackwardPairConfig<__half, kHeadDim, kHeadDimV, kRowParts>>};

template <int kHeadDim, int kHeadDimV>
constexpr BackwardVariant backward_pair_variant(const char* name) {
  using Config = BackwardPairConfig<__nv_bfloat16, kHeadDim, kHeadDimV>;
  BackwardVariant variant{};
  variant.name = name;
  variant.head_dim = kHeadDim;
  variant.head_dim_v = kHeadDimV;
  variant.dq_columns = 64 * Config::kDqPanels;
  variant.block_m = Config::kBlockM;
  variant.block_n = Config::kBlockN;
  variant.map_rows = Config::kRowsN;
  variant.cluster = 2;
  variant.accum_factor_bf16 = Config::kProbabilityFactor;
  variant.descends = Config::kDescends;
  variant.launch = kLaunchBackwardPair<kHeadDim, kHeadDimV, false>;
  variant.launch_row_parts = kLaunchBackwardPair<kHeadDim, kHeadDimV, true>;
  return variant;
}

}  // namespace flash_attn::sm90
