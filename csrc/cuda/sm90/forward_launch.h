// From a compiled configuration to an entry of forward_plan.h's list. Only instantiation files include this.
#pragma once

#include "combine.h"
#include "forward_kernel.h"
#include "forward_plan.h"
#include "launch.h"
#include "prepare.h"
#include "tensor_map.h"

namespace flash_attn::sm90 {

constexpr int kMaxSharedBytes = 232448;  // a CTA's, on compute capability 9.0

template <typename Config>
void launch_forward(const ForwardParams& problem, const ForwardPlan& plan, cudaStream_t stream) {
  static_assert(sizeof(SharedStorage<Config>) <= kMaxSharedBytes, "the tiles do not fit");
  const ForwardSources tensors = forward_sources(problem);
  const float scale_log2 = static_cast<float>(problem.softmax_scale * 1.4426950408889634);
  const ForwardKernelParams params{make_tensor_map(tensors.q, Config::kBlockM),
                                   make_tensor_map(tensors.k, Config::kBlockN),
                                   make_tensor_map(tensors.v, Config::kBlockN),
                                   make_tensor_map(tensors.out, 16),
                                   problem,
                                   plan.schedule,
                                   scale_log2,
                                   static_cast<int>((problem.head_dim + 63) / 64),
                                   static_cast<int>((problem.head_dim_v + 63) / 64),
                                   new_launch_id()};

  if (plan.needs_prepare()) {
    launch_prepare(problem, Config::kBlockM, plan.schedule.first_m_block, stream);
  }
  constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
  const auto kernel = forward_kernel<Config>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "shared memory");
  if (plan.needs_prepare()) {
    launch_dependent(kernel, dim3(plan.grid), Config::kThreads, kSharedBytes, stream, params, "forward");
  } else {
    kernel<<<plan.grid, Config::kThreads, kSharedBytes, stream>>>(params);
    check(cudaGetLastError(), "forward");
  }
  if (plan.is_split()) {
    launch_combine({problem, plan.schedule, Config::kBlockM, Config::kHeadDimV}, stream);
  }
}

template <typename Shape, bool kMasked>
constexpr ForwardVariant forward_variant(const char* name, double efficiency, double tile_clocks) {
  using Config = ForwardConfig<__nv_bfloat16, Shape, kMasked>;
  return {name,
          Config::kHeadDim,
          Config::kHeadDimV,
          kMasked,
          Config::kOutBuffer,
          Config::kBlockM,
          Config::kBlockN,
          efficiency,
          tile_clocks,
          launch_forward<Config>,
          launch_forward<ForwardConfig<__half, Shape, kMasked>>};
}

template <int kCount>
constexpr ForwardVariants list_of(const ForwardVariant (&variants)[kCount]) {
  return {variants, kCount};
}

}  // namespace flash_attn::sm90
