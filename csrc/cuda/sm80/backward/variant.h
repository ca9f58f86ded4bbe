// The backward kernels that exist. A head dimension's are listed in its file of instances/.
#pragma once

#include "../rules.h"
#include "params.h"

namespace flash_attn::cuda::sm80 {

/// What a block takes, in clocks of an SM: benchmarks/experiments/089.
struct StepClocks {
  double products = 600;  // multiply-adds a clock where an SM has blocks enough
  double start = 6000;    // of each block beside its products
};

struct BackwardVariant {
  const char* name;
  int head_dim;  // the largest that it takes, of q and of v
  int block_m, block_n, warps;
  int blocks_per_sm;  // that registers allow
  int shared_bytes;
  Rules rules;
  unsigned gpus;  // that it is for, see code.h
  StepClocks clocks;
  void (*kernel[2])(const BackwardKernelParams);  // for bfloat16, float16
};

/// Of the gradient of attn_mask.
struct MaskGradientVariant {
  int block_m, block_n, warps;
  int shared_bytes;
  void (*kernel[2])(const MaskGradientParams);  // for bfloat16, float16
};

struct BackwardVariants {
  const BackwardVariant* first;
  int count;
  MaskGradientVariant mask_gradient;
  const BackwardVariant* begin() const { return first; }
  const BackwardVariant* end() const { return first + count; }
};

extern const BackwardVariants kBackwardD32, kBackwardD64, kBackwardD96, kBackwardD128, kBackwardD192, kBackwardD256,
    kBackwardD512;

}  // namespace flash_attn::cuda::sm80
