// A single value of an additive attn_mask, where they are few; kernels read them as fragments (scores.h).
#pragma once

#include <cuda_fp16.h>

#include "../../../params.h"
#include "../ptx.h"

namespace flash_attn::cuda {

FLASH_ATTN_DEVICE float bias_value(const MaskView& mask, int64_t place) {
  if (mask.dtype == DType::kFloat32) return static_cast<const float*>(mask.data)[place];
  const uint16_t x = static_cast<const uint16_t*>(mask.data)[place];
  return mask.dtype == DType::kBFloat16 ? __uint_as_float(uint32_t{x} << 16) : __half2float(__ushort_as_half(x));
}

}  // namespace flash_attn::cuda
