// What the plan has to know of a configuration of two CTAs.
#pragma once

#include "../plan.h"

namespace flash_attn::cuda::sm90::backward::pair {

/// All but how it is launched.
template <typename Config>
constexpr Variant variant_of(const char* name) {
  Variant variant{};
  variant.name = name;
  variant.head_dim = Config::kHeadDim;
  variant.head_dim_v = Config::kHeadDimV;
  variant.dq_columns = 64 * Config::kDqPanels;
  variant.block_m = Config::kBlockM;
  variant.block_n = Config::kBlockN;
  variant.map_rows = Config::kRowsN;
  variant.cluster = Config::kCtas;
  variant.accum_factor_bf16 = Config::kProbabilityFactor;
  variant.dq_path = DqPath::kRegisters;
  variant.descends = Config::kDescends;
  return variant;
}

}  // namespace flash_attn::cuda::sm90::backward::pair
