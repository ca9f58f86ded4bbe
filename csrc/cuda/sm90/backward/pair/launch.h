// From a compiled configuration of two CTAs to a Variant. Only instantiation files include this.
#pragma once

#include "../launch_kernel.h"
#include "kernel.h"
#include "variant.h"

namespace flash_attn::cuda::sm90::backward::pair {

template <typename Config>
constexpr auto kLaunchKernel =
    launch_kernel<backward_pair_kernel<Config>, Config::kThreads, int{sizeof(SharedStorage<Config>)}>;

template <int kHeadDim, int kHeadDimV, bool kRowParts>
constexpr Launch kLaunch = {kLaunchKernel<KernelConfig<__nv_bfloat16, kHeadDim, kHeadDimV, kRowParts>>,
                            kLaunchKernel<KernelConfig<__half, kHeadDim, kHeadDimV, kRowParts>>};

template <int kHeadDim, int kHeadDimV>
constexpr Variant make_variant(const char* name) {
  Variant variant = variant_of<KernelConfig<__nv_bfloat16, kHeadDim, kHeadDimV>>(name);
  variant.launch = kLaunch<kHeadDim, kHeadDimV, false>;
  variant.launch_row_parts = kLaunch<kHeadDim, kHeadDimV, true>;
  return variant;
}

template <int kHeadDim, int kHeadDimV>
constexpr Variant make_band_variant(const char* name) {
  Variant variant = variant_of<KernelConfig<__nv_bfloat16, kHeadDim, kHeadDimV>>(name);
  variant.launch = {kLaunchKernel<BandConfig<__nv_bfloat16, kHeadDim, kHeadDimV>>,
                    kLaunchKernel<BandConfig<__half, kHeadDim, kHeadDimV>>};
  return variant;
}

}  // namespace flash_attn::cuda::sm90::backward::pair
