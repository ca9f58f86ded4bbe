// Bits of a packed mask for transposed fragments, whose rows are keys: they are the same bits, held by other lanes.
#pragma once

#include "packed_mask.h"

namespace flash_attn::cuda::mask {

/// Of sixteen queries and the 64 keys of a cell: bit 4 n + 2 r + c of lane 4 g + t says whether query 8 r + 2 t + c
/// sees key 8 n + g.
__device__ __forceinline__ uint32_t transposed_bits(const PackedMask& packed, int64_t cell, int lane) {
  // Lanes 4 (2 t + c) + g / 2 of a fragment of S hold keys 8 n + g / 2 * 2 + {0, 1} of query 8 r + 2 t + c.
  const uint32_t* const from = packed.bits + cell * 32 + lane % 4 * 8 + lane / 8;
  const int odd = lane / 4 % 2;
  const uint32_t first = __ldg(from) >> odd, second = __ldg(from + 4) >> odd;
  return (first & 0x55555555u) | (second & 0x55555555u) << 1;
}

}  // namespace flash_attn::cuda::mask
