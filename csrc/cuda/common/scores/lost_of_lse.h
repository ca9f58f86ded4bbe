// What an lse of float32 cannot hold beside a very large score, for backward passes.
#pragma once

#include <cuda_fp16.h>

#include "../../../params.h"
#include "../../../sequence.h"
#include "../ptx.h"

namespace flash_attn::cuda {

FLASH_ATTN_DEVICE float bias_value(const MaskView& mask, int64_t place) {
  if (mask.dtype == DType::kFloat32) return static_cast<const float*>(mask.data)[place];
  const uint16_t x = static_cast<const uint16_t*>(mask.data)[place];
  return mask.dtype == DType::kBFloat16 ? __uint_as_float(uint32_t{x} << 16) : __half2float(__ushort_as_half(x));
}

/// To the base 2, minus the logarithm of a row's sum where lse is too large to hold it beside the largest score: where
/// a row sees nothing but keys to which attn_mask adds the smallest number, say. Beside such numbers the product of q
/// and k is lost, so the sum is how many keys have the largest one. All lanes of a warp, each for a row of its own.
FLASH_ATTN_DEVICE float lost_of_lse(const ForwardParams& p, const SequenceInfo& info, int64_t b, int64_t head,
                                    int64_t row, float lse) {
  constexpr float kLowest = -0x1p100f;
  const MaskView& mask = p.mask;
  const int lane = threadIdx.x % 32;
  float lost = 0.f;
  for (uint32_t rows = __ballot_sync(~0u, lse < kLowest && lse != -INFINITY); rows != 0; rows &= rows - 1) {
    const int owner = __ffs(static_cast<int>(rows)) - 1;
    const int64_t of_row = __shfl_sync(~0u, row, owner);
    const float largest = __shfl_sync(~0u, lse, owner);
    const Range keys = visible_columns(p, info, of_row);
    const int64_t first = b * mask.batch + head * mask.head + of_row * mask.row;
    int count = 0;
    for (int64_t key = clamp<int64_t>(keys.begin, 0, info.seqlen_k) + lane;
         key < clamp<int64_t>(keys.end, 0, info.seqlen_k); key += 32) {
      count += bias_value(mask, first + key * mask.col) == largest;
    }
    count = __reduce_add_sync(~0u, count);
    if (lane == owner) lost = -log2f(static_cast<float>(max(count, 1)));
  }
  return lost;
}

}  // namespace flash_attn::cuda
