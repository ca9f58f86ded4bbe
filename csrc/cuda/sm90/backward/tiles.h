// What both kernels do with tiles in shared memory.
#pragma once

#include "../../common/swizzle.h"
#include "../../mask/bad_values.h"
#include "../hopper/tma.h"

namespace flash_attn::cuda::sm90::backward {

/// Zeros where no copy will write: wgmma reads all panels of a tile.
template <int kThreads>
FLASH_ATTN_DEVICE void clear_shared(void* begin, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += kThreads) static_cast<uint4*>(begin)[i] = uint4{0, 0, 0, 0};
  async_proxy_fence();
}

/// 0 for what is not finite of 16 bytes; whether some is.
template <typename Element>
FLASH_ATTN_DEVICE bool clear_bad_values(uint32_t shared) {
  constexpr uint32_t kExponent = kBadExponent<Element>;
  uint32_t x[4];
  load_shared(shared, x);
  bool bad = false;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const bool low = is_bad_low(x[j], kExponent), high = is_bad_high(x[j], kExponent);
    bad |= low | high;
    x[j] &= (low ? 0u : 0xffffu) | (high ? 0u : 0xffff0000u);
  }
  if (bad) store_shared(shared, x);
  return bad;
}

/// From 16-bit fragments of S^T or dP^T, 64 key rows by query rows, to where a lane's stmatrix row of dS begins in a
/// panel [query rows][64 key rows]; 16 query rows on are 2048 bytes further.
FLASH_ATTN_DEVICE int ds_store_offset(int warp, int lane) {
  const int chunk = swizzled_chunk(2 * warp + lane / 8 % 2, lane);
  return (lane % 8 + lane / 16 * 8) * 128 + chunk * 16;
}

}  // namespace flash_attn::cuda::sm90::backward
