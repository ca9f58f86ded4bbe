// The forward kernels that exist. A head dimension's are listed in its file of instances/.
#pragma once

#include <cuda_runtime_api.h>

#include "../../../kernel.h"
#include "../rules.h"
#include "params.h"

namespace flash_attn::cuda::sm80 {

/// What a block takes, in clocks of an SM: benchmarks/experiments/088.
struct TileClocks {
  double products = 640;  // multiply-adds a clock where an SM has blocks enough
  double start = 5000;    // of each block beside its products
  double cold = 20000;    // until an SM's first block runs at that rate: its code comes from memory
};

struct ForwardVariant {
  const char* name;
  int head_dim;  // the largest that it takes, of q and of v
  int block_m, block_n, threads;
  int blocks_per_sm;  // that its registers allow
  Rules rules;
  unsigned gpus;  // that it is for, see code.h
  TileClocks clocks;
  int tile_bytes;                                // of shared memory, for tiles of q, k and v
  int copy_step;                                 // rows of K and V between those that one thread copies
  void (*kernel[2])(const ForwardKernelParams);  // for bfloat16, float16
};

struct ForwardVariants {
  const ForwardVariant* first;
  int count;
  const ForwardVariant* begin() const { return first; }
  const ForwardVariant* end() const { return first + count; }
};

extern const ForwardVariants kForwardD32, kForwardD64, kForwardD96, kForwardD128, kForwardD192, kForwardD256,
    kForwardD512;

}  // namespace flash_attn::cuda::sm80
