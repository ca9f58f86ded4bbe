// From a compiled configuration of two CTAs to a Variant. Only instantiation files include this.
#pragma once

#include "../../../common/launch.h"
#include "../../hopper/budgets.h"
#include "../plan.h"
#include "kernel.h"

namespace flash_attn::cuda::sm90::backward::pair {

template <typename Config>
void launch_kernel(const KernelParams& params, int grid, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
  static_assert(kSharedBytes <= kMaxSharedBytes, "the tiles do not fit");
  const auto kernel = backward_pair_kernel<Config>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "sm90 shared memory");
  launch_dependent(kernel, dim3(grid), Config::kThreads, kSharedBytes, stream, params, "sm90 backward");
}

template <int kHeadDim, int kHeadDimV, bool kRowParts>
constexpr Launch kLaunch = {launch_kernel<KernelConfig<__nv_bfloat16, kHeadDim, kHeadDimV, kRowParts>>,
                            launch_kernel<KernelConfig<__half, kHeadDim, kHeadDimV, kRowParts>>};

template <int kHeadDim, int kHeadDimV>
constexpr Variant make_variant(const char* name) {
  using Config = KernelConfig<__nv_bfloat16, kHeadDim, kHeadDimV>;
  Variant variant{};
  variant.name = name;
  variant.head_dim = kHeadDim;
  variant.head_dim_v = kHeadDimV;
  variant.dq_columns = 64 * Config::kDqPanels;
  variant.block_m = Config::kBlockM;
  variant.block_n = Config::kBlockN;
  variant.map_rows = Config::kRowsN;
  variant.cluster = 2;
  variant.accum_factor_bf16 = Config::kProbabilityFactor;
  variant.dq_path = DqPath::kRegisters;
  variant.descends = Config::kDescends;
  variant.launch = kLaunch<kHeadDim, kHeadDimV, false>;
  variant.launch_row_parts = kLaunch<kHeadDim, kHeadDimV, true>;
  return variant;
}

}  // namespace flash_attn::cuda::sm90::backward::pair
