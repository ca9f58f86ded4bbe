// From an extended configuration to an entry of plan.h's list. Only instantiation files include this.
#pragma once

#include "../launch.h"
#include "kernel.h"

namespace flash_attn::cuda::sm90::forward {

/// Columns 2 j and 2 j + 1 of an additive mask are one aligned word.
inline bool has_mask_pairs(const MaskView& mask) {
  const int64_t bytes = 2 * size_of(mask.dtype);
  return mask.col == 1 && reinterpret_cast<uintptr_t>(mask.data) % bytes == 0 && mask.batch % 2 == 0 &&
         mask.head % 2 == 0 && mask.row % 2 == 0;
}

template <typename Config>
void launch_extended_kernel(const ForwardParams& p, const Plan& plan, cudaStream_t stream) {
  static_assert(sizeof(ExtendedStorage<Config>) <= kMaxSharedBytes, "the tiles do not fit");
  constexpr float kLog2E = 1.4426950408889634f;
  ExtendedParams params{kernel_params<Config>(p, plan)};
  if (Config::kBias == Bias::kStaged) params.bias = make_mask_map(p.mask, 64);
  params.packed = plan.packed;
  params.bad_rows = plan.bad_rows;
  params.condition = plan.condition;
  params.natural = p.softcap > 0 || p.alibi_slopes != nullptr || p.has_bias();
  params.has_bits = p.has_bool_mask();
  params.has_dropout = p.dropout_p > 0;
  params.mask_pairs = has_mask_pairs(p.mask);
  params.scale = static_cast<float>(p.softmax_scale);
  params.softcap = static_cast<float>(p.softcap);
  params.inner = params.scale / params.softcap;
  if (Config::kCapPolynomial && p.softcap > 0) params.cap = CapPolynomial::of(params.inner, params.softcap);
  params.to_natural = params.natural ? 1.f : params.scale;
  params.to_log2 = params.to_natural * kLog2E;
  launch_forward<Config>(extended_forward_kernel<Config>, sizeof(ExtendedStorage<Config>), params, plan, stream);
}

/// kRules: with softcap, ALiBi or dropout.
template <typename Shape, Bias kBias, bool kRules>
constexpr Variant make_extended_variant(const char* name, double efficiency, double tile_clocks) {
  using Config = ExtendedConfig<__nv_bfloat16, Shape, kBias, kRules>;
  return {name,
          Config::kHeadDim,
          Config::kHeadDimV,
          true,
          kBias != Bias::kNone,
          kBias == Bias::kStaged,
          kRules,
          Config::kOutBuffer,
          /* cluster */ false,
          Config::kBlockM,
          Config::kBlockN,
          efficiency,
          tile_clocks,
          launch_extended_kernel<Config>,
          launch_extended_kernel<ExtendedConfig<__half, Shape, kBias, kRules>>};
}

}  // namespace flash_attn::cuda::sm90::forward
