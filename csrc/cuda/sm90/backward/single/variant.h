// What the plan has to know of a configuration of one CTA a tile.
#pragma once

#include "../plan.h"

namespace flash_attn::cuda::sm90::backward::single {

/// All but how it is launched.
template <typename Config>
constexpr Variant variant_of(const char* name) {
  Variant variant{};
  variant.name = name;
  variant.head_dim = variant.head_dim_v = Config::kHeadDim;
  variant.dq_columns = 64 * Config::kPanels;
  variant.block_m = Config::kBlockM;
  variant.block_n = variant.map_rows = Config::kBlockN;
  variant.cluster = 1;
  variant.dq_path = Config::kDqPath;
  variant.descends = Config::kDescends;
  return variant;
}

}  // namespace flash_attn::cuda::sm90::backward::single
