// Forward: FlashAttention-2's order (Dao 2023, arXiv:2307.08691, algorithm 1). A block owns kBlockM query rows of one
// head and walks over the tiles of keys that they see, the last ones first. Tiles of K and V come by cp.async through a
// ring of slots in shared memory: K, V of the first tile, K, V of the second, ...
//
// A warp takes a tile in two halves and computes S of the next half while it takes the exponentials of the last one, so
// that the tensor cores have work throughout (FlashAttention-3's overlap inside a warpgroup, arXiv:2407.08608, section
// 3.2, by the order of instructions alone):
//
//   rescale by S0        S1 = Q K1^T under P0 = exp(S0)        wait for V       O += P0 V0
//   rescale by S1        S0 = Q K0^T of the next tile under P1 = exp(S1)        O += P1 V1
//
// or, where registers hold S of a whole tile, one after the other. Where they do not hold O of 16 rows, warps have rows
// in common (kWarpsD): each has S of other keys and O of other columns, maxima and P go through shared memory:
//
//   maxima of all keys        P = exp(S) to shared memory   wait for V     O += P V, own columns
//
// Each wait ends in a barrier, which also says that
// all warps are done with an earlier tile: its slot is filled anew.
#pragma once

#include "block.h"
#include "epilogue.h"
#include "loading.h"
#include "rows_in_common.h"
#include "schedule/visited_tiles.h"
#include "unseen_values.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    forward_kernel(const __grid_constant__ ForwardKernelParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint32_t alive[32];
  __shared__ ForwardTile shared_tile;  // read again wherever it is needed: it would take twenty registers
  {
    ForwardTile tile;
    if (!find_tile<Config::kBlockM, Config::kBlockN>(params, tile)) return;
    if (threadIdx.x == 0) shared_tile = tile;
  }
  if (Config::kExtended && threadIdx.x < 32) alive[threadIdx.x] = 0;
  __syncthreads();  // the tile and `alive` are there
  ForwardBlock<Config>(params, shared_tile, shared, alive).run();
}

}  // namespace flash_attn::cuda::sm80
