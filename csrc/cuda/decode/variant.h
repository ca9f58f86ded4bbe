// The kernels of one head dimension.
#pragma once

#include "params.h"

namespace flash_attn::cuda::decode {

struct Variant {
  const char* name;
  int head_dim, head_dim_v, block_m, block_n, threads, blocks_per_sm;
  int fixed_bytes, stage_bytes;  // of shared memory
  int cluster_stages;            // that a CTA of a cluster has at least: see ends/cluster.h
  bool float8;
  void (*kernel[2])(DecodeParams);                               // by q's dtype: bfloat16, float16
  int64_t partial_rows() const { return int64_t{2} * block_m; }  // of the workspace, a CTA: see parts.h
  int64_t partial_bytes() const { return partial_rows() * (head_dim_v * 4 + 8); }
};

/// Few rows first.
struct Variants {
  const Variant* first;
  int count;
};

extern const Variants kD64, kD96, kD128, kD192, kD256;
extern const Variants kD64Float8, kD128Float8, kD192Float8, kD256Float8;  // of float8 caches
/// Tiles of 64 rows on Hopper.
extern const Variant kD64Warpgroup, kD96Warpgroup, kD128Warpgroup, kD192Warpgroup, kD256Warpgroup;
/// Values that are a part of the keys, on Hopper.
extern const Variant kLatent;

}  // namespace flash_attn::cuda::decode
