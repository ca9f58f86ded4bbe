// The backward kernels for float32 that exist. A head dimension's are listed in its file of instances/, the preferred
// ones first.
#pragma once

#include "gradients.h"
#include "params.h"

namespace flash_attn::cuda::sm80::fp32 {

struct BackwardVariant {
  const char* name;
  int head_dim;                   // the largest that it takes, of q and of v
  int block_m, block_n, threads;  // rows that a block owns, that a tile of others has
  int gradients;                  // Gradients that it computes. dq beside others is added to, in whatever order
  bool extended;                  // takes softcap, ALiBi, attn_mask, dropout
  int shared_bytes;
  void (*kernel)(const BackwardKernelParams);

  bool of_keys() const { return gradients != kDq; }
  bool adds_dq() const { return of_keys() && (gradients & kDq) != 0; }
};

struct BackwardVariants {
  const BackwardVariant* first;
  int count;
  const BackwardVariant* begin() const { return first; }
  const BackwardVariant* end() const { return first + count; }
};

extern const BackwardVariants kBackwardD32, kBackwardD64, kReducedBackwardD64;

}  // namespace flash_attn::cuda::sm80::fp32
