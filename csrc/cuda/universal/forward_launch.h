// Between the forward pass's entry and its instances.
#pragma once

#include <cuda_runtime_api.h>

#include "extended.h"

namespace flash_attn::cuda::universal {

/// T: double, float, __nv_bfloat16, __half. Instantiated in forward_*.cu. `flags` (batch, KV heads): only those heads
/// whose number is not 0 are computed; null: all.
template <typename T>
void launch_forward(const ForwardParams& params, const int* flags, cudaStream_t stream);

/// Columns of the output that a block holds.
inline int forward_bucket(const ForwardParams& p) {
  if (p.cache.exists()) return 64;
  if (p.head_dim <= 16 && p.head_dim_v <= 16 && !is_extended(p)) return 16;
  return p.head_dim_v <= 64 ? 64 : 128;
}

// For 8.0 ptxas spills two registers of 16 columns where there are to be four.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr bool kSpillsAtFour = true;
#else
constexpr bool kSpillsAtFour = false;
#endif

/// Registers are bounded so that as many blocks fit into an SM.
template <typename T, int kHeadDim, bool kExtended>
constexpr int kForwardBlocksPerSm = sizeof(T) == 8                                       ? 2
                                    : kHeadDim > 64 || (kHeadDim == 16 && kSpillsAtFour) ? 3 - (kExtended ? 1 : 0)
                                                                                         : 4 - (kExtended ? 1 : 0);

}  // namespace flash_attn::cuda::universal
