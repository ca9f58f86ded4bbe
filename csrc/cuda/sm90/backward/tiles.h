// What both kernels do with tiles in shared memory.
#pragma once

#include "../../common/swizzle.h"
#include "../hopper/tma.h"

namespace flash_attn::cuda::sm90::backward {

/// Zeros where no copy will write: wgmma reads all panels of a tile.
template <int kThreads>
FLASH_ATTN_DEVICE void clear_shared(void* begin, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += kThreads) static_cast<uint4*>(begin)[i] = uint4{0, 0, 0, 0};
  async_proxy_fence();
}

/// From 16-bit fragments of S^T or dP^T, 64 key rows by query rows, to where a lane's stmatrix row of dS begins in a
/// panel [query rows][64 key rows]; 16 query rows on are 2048 bytes further.
FLASH_ATTN_DEVICE int ds_store_offset(int warp, int lane) {
  const int chunk = swizzled_chunk(2 * warp + lane / 8 % 2, lane);
  return (lane % 8 + lane / 16 * 8) * 128 + chunk * 16;
}

}  // namespace flash_attn::cuda::sm90::backward
