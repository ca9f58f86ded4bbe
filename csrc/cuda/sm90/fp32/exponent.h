// The power of two that dS of a warpgroup has, which its products over keys and over queries can bear alike.
#pragma once

#include "../../sm80/fp32/pair.h"
#include "../hopper/barriers.h"

namespace flash_attn::cuda::sm90::fp32 {

/// For all threads of a warpgroup: a power of two that brings the largest of its dS to at least 2^14, if that is no
/// larger than 2^100. Ends in a barrier of the warpgroup: of as many, the first is `barriers`. Block: what has dS; its
/// lane() and warp() are asked where they are used, as registers are few.
template <int kWarps, int kTiles, typename Block, typename Warpgroup>
SM80_DEVICE int find_exponent(const Block& block, const float (&ds)[kTiles][4], const Warpgroup& warpgroup,
                              int barriers) {
  __shared__ __align__(16) uint32_t maxima[kWarps];
  uint32_t largest = 0;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(ds[n][i]) & 0x7fffffffu);
  largest = __reduce_max_sync(~0u, largest);
  if (block.lane() == 0) maxima[block.warp()] = largest;
  named_barrier_sync(barriers + warpgroup(), 128);
  const uint4 all = *reinterpret_cast<const uint4*>(maxima + warpgroup() * 4);
  largest = max(max(all.x, all.y), max(all.z, all.w));
  return min(14 + 127 - int(largest >> 23), 100);
}

}  // namespace flash_attn::cuda::sm90::fp32
