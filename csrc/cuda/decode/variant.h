// The kernels of one head dimension.
#pragma once

#include "params.h"

namespace flash_attn::cuda::decode {

struct Variant {
  const char* name;
  int head_dim, block_m, block_n, threads, blocks_per_sm;
  int fixed_bytes, stage_bytes;     // of shared memory
  int64_t partial_bytes;            // of the workspace, a CTA
  void (*kernel[2])(DecodeParams);  // by q's dtype: bfloat16, float16
};

/// Few rows first.
struct Variants {
  const Variant* first;
  int count;
};

extern const Variants kD64, kD96, kD128, kD192, kD256;
extern const Variants kD64Float8, kD128Float8, kD192Float8, kD256Float8;  // of float8 caches

}  // namespace flash_attn::cuda::decode
