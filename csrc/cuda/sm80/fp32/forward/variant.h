// The forward kernels for float32 that exist. A head dimension's are listed in its file of instances/.
#pragma once

#include "params.h"

namespace flash_attn::cuda::sm80::fp32 {

struct ForwardVariant {
  const char* name;
  int head_dim;  // the largest that it takes, of q and of v
  int block_m, block_n, threads;
  int blocks_per_sm;            // that its registers allow
  bool extended;                // takes softcap, ALiBi, attn_mask, dropout, any softmax_scale
  int query_bytes, slot_bytes;  // of shared memory
  int least_slots;
  int least_columns;  // chosen where a query row sees as many keys on average
  void (*kernel)(const ForwardKernelParams);
};

struct ForwardVariants {
  const ForwardVariant* first;
  int count;
  const ForwardVariant* begin() const { return first; }
  const ForwardVariant* end() const { return first + count; }
};

extern const ForwardVariants kForwardD32, kForwardD64, kReducedForwardD64;

}  // namespace flash_attn::cuda::sm80::fp32
