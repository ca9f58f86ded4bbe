// Caches in float8_e4m3fn: what kernels that read them get beside the problem.
#pragma once

#include "params.h"

namespace flash_attn {

/// What the numbers of a float8 tensor are multiples of, one for each sequence and head of keys.
struct Descale {
  const float* data = nullptr;  // null: 1
  int64_t batch = 0, head = 0;  // strides; 0 broadcasts

  FLASH_ATTN_HOST_DEVICE float at(int64_t b, int64_t h) const {
    return data == nullptr ? 1.f : data[b * batch + h * head];
  }
};

/// k and v are float8_e4m3fn; dtype is that of q and out, bfloat16 or float16. The cache exists.
struct Float8Params : ForwardParams {
  Descale k_descale, v_descale;
};

}  // namespace flash_attn
