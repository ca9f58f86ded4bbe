// What a forward kernel for float32 is given.
#pragma once

#include "../../forward/params.h"
#include "../planes.h"

namespace flash_attn::cuda::sm80::fp32 {

struct ForwardKernelParams : sm80::ForwardKernelParams {
  Planes q, k, v;
  int slots;         // of shared memory for tiles of K and V
  const int* flags;  // (batch, KV heads): not 0 is left to the universal kernels
};

}  // namespace flash_attn::cuda::sm80::fp32
