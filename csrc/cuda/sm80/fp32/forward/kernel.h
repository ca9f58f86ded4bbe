// Forward for float32: FlashAttention-2's order (Dao 2023, arXiv:2307.08691, algorithm 1), products as in ../planes.h.
// A block owns kBlockM query rows of one head and walks over the tiles of keys that they see, the last ones first.
// Pairs of K and V come by cp.async through a ring of slots in shared memory: K, V of the first tile, K, V of the
// second, ... For each tile:
//
//   P = exp(S - max), rescale O        wait for V        O += P V         wait for the next K        S = Q K^T
//
// Each wait ends in a barrier, which also says that all warps are done with the tile before: its slot is filled anew.
#pragma once

#include "block.h"
#include "epilogue.h"
#include "loading.h"

namespace flash_attn::cuda::sm80::fp32 {

/// Block: ForwardBlock<Config>, or what is built on it.
template <typename Config, typename Block>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    forward_kernel(const __grid_constant__ ForwardKernelParams params) {
  if constexpr (Config::kHasCode) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ ForwardPlace shared_tile;
    {
      ForwardPlace tile;
      if (!find_tile<Config::kBlockM, Config::kBlockN>(params, tile)) return;
      if (params.flags[int64_t{tile.batch} * params.problem.num_heads_k + tile.kv_head] != 0) return;
      tile.find_sources(params);
      if (threadIdx.x == 0) shared_tile = tile;
    }
    __syncthreads();  // the tile is there
    constexpr uint32_t kMask = Config::Products::kAlignment - 1;
    Block(params, shared_tile, (shared_address(shared) + kMask) & ~kMask).run();
  }
}

}  // namespace flash_attn::cuda::sm80::fp32
