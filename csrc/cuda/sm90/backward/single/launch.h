// From a compiled configuration to a Variant. Only instantiation files include this.
#pragma once

#include "../launch_kernel.h"
#include "kernel.h"
#include "variant.h"

namespace flash_attn::cuda::sm90::backward::single {

template <typename Config>
constexpr auto kLaunchKernel =
    launch_kernel<backward_kernel<Config>, Config::kThreads, int{sizeof(SharedStorage<Config>)}>;

template <typename Shape, bool kRowParts>
constexpr Launch kLaunch = {kLaunchKernel<KernelConfig<__nv_bfloat16, Shape, kRowParts>>,
                            kLaunchKernel<KernelConfig<__half, Shape, kRowParts>>};

template <typename Shape>
constexpr Variant make_variant(const char* name) {
  using Config = KernelConfig<__nv_bfloat16, Shape>;
  Variant variant = variant_of<Config>(name);
  variant.launch = kLaunch<Shape, false>;
  if constexpr (Config::kDqPath != DqPath::kOneCta) variant.launch_row_parts = kLaunch<Shape, true>;
  return variant;
}

template <typename Shape>
struct BandShape : Shape {
  static constexpr bool kBand = true;
};

template <typename Shape>
constexpr Variant make_band_variant(const char* name) {
  Variant variant = variant_of<KernelConfig<__nv_bfloat16, Shape>>(name);
  variant.launch = kLaunch<BandShape<Shape>, false>;
  return variant;
}

}  // namespace flash_attn::cuda::sm90::backward::single
