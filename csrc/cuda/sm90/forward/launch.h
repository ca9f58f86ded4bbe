// From a compiled configuration to an entry of plan.h's list. Only instantiation files include this.
#pragma once

#include "../../common/combine.h"
#include "../../common/launch.h"
#include "../../common/shared_memory.h"
#include "../hopper/tensor_map.h"
#include "kernel.h"
#include "plan.h"
#include "prepare.h"

namespace flash_attn::cuda::sm90::forward {

template <typename Config>
KernelParams kernel_params(const ForwardParams& problem, const Plan& plan) {
  const Sources tensors = sources(problem);
  return {make_tensor_map(tensors.q, Config::kBlockM),
          make_tensor_map(tensors.k, Config::kBlockN),
          make_tensor_map(tensors.v, Config::kBlockN),
          make_tensor_map(tensors.out, 16),
          problem,
          plan.schedule,
          static_cast<float>(problem.softmax_scale),
          static_cast<float>(problem.softmax_scale * 1.4426950408889634),
          static_cast<int>((problem.head_dim + 63) / 64),
          static_cast<int>((problem.head_dim_v + 63) / 64),
          new_launch_id()};
}

template <typename Params>
void launch_cluster(void (*kernel)(const Params), int grid, int ctas, int threads, int shared_bytes,
                    cudaStream_t stream, const Params& params) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = ctas;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), "sm90 forward");
}

/// What has to come before the kernel, the kernel, and what has to come after it.
template <typename Config, typename Params>
void launch_forward(void (*kernel)(const Params), int shared_bytes, const Params& params, const Plan& plan,
                    cudaStream_t stream) {
  const ForwardParams& problem = params.problem;
  if (plan.needs_prepare()) {
    launch_prepare(problem, Config::kBlockM, plan.schedule.first_m_block, stream);
  }
  allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes, "sm90 shared memory");
  if constexpr (Config::kCluster) {
    launch_cluster(kernel, plan.grid, plan.schedule.num_splits, Config::kThreads, shared_bytes, stream, params);
    return;
  }
  if (plan.needs_prepare() || Config::kBand) {  // what these wait for comes from the kernel before
    launch_dependent(kernel, dim3(plan.grid), Config::kThreads, shared_bytes, stream, params, "sm90 forward");
  } else {
    kernel<<<plan.grid, Config::kThreads, shared_bytes, stream>>>(params);
    check(cudaGetLastError(), "sm90 forward");
  }
  if (plan.has_partials()) {
    launch_combine({problem, plan.schedule, Config::kBlockM, Config::kHeadDimV, params.to_natural, params.to_log2},
                   stream);
  }
}

template <typename Config>
void launch_kernel(const ForwardParams& problem, const Plan& plan, cudaStream_t stream) {
  static_assert(sizeof(StorageOf<Config>) <= kMaxSharedBytes, "the tiles do not fit");
  launch_forward<Config>(forward_kernel<Config>, sizeof(StorageOf<Config>), kernel_params<Config>(problem, plan), plan,
                         stream);
}

template <typename Shape, bool kMasked>
constexpr Variant make_variant(const char* name, double efficiency, double tile_clocks) {
  using Config = KernelConfig<__nv_bfloat16, Shape, kMasked>;
  return {name,
          Config::kHeadDim,
          Config::kHeadDimV,
          kMasked,
          /* biased */ false,
          /* staged */ false,
          /* rules */ false,
          Config::kOutBuffer,
          Config::kCluster,
          Config::kBlockM,
          Config::kBlockN,
          efficiency,
          tile_clocks,
          launch_kernel<Config>,
          launch_kernel<KernelConfig<__half, Shape, kMasked>>};
}

template <typename Shape>
struct ClusterShape : Shape {
  static constexpr bool kCluster = true;
};

/// Of a shape with two consumers, and its constants.
template <typename Shape, bool kMasked>
constexpr Variant make_cluster_variant(const char* name, double efficiency, double tile_clocks) {
  return make_variant<ClusterShape<Shape>, kMasked>(name, efficiency, tile_clocks);
}

template <typename Config>
void launch_band_kernel(const ForwardParams& problem, const Plan& plan, cudaStream_t stream) {
  static_assert(sizeof(SharedStorage<Config>) <= kMaxSharedBytes, "the tiles do not fit");
  const BandParams params{kernel_params<Config>(problem, plan), &plan.condition.band()};
  launch_forward<Config>(forward_kernel<Config>, sizeof(SharedStorage<Config>), params, plan, stream);
}

template <typename Shape>
struct BandShape : Shape {
  static constexpr bool kBand = true;
};

/// Of a shape of a kernel with bounds, and its constants.
template <typename Shape>
constexpr Variant make_band_variant(const char* name, double efficiency, double tile_clocks) {
  Variant variant = make_variant<Shape, true>(name, efficiency, tile_clocks);
  variant.launch_bf16 = launch_band_kernel<KernelConfig<__nv_bfloat16, BandShape<Shape>, true>>;
  variant.launch_fp16 = launch_band_kernel<KernelConfig<__half, BandShape<Shape>, true>>;
  return variant;
}

template <int kCount>
constexpr Variants list_of(const Variant (&variants)[kCount]) {
  return {variants, kCount};
}

}  // namespace flash_attn::cuda::sm90::forward
