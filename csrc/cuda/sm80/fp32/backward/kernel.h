// Backward for float32 (Dao 2023, arXiv:2307.08691, algorithm 2, in two kernels, see config.h), products as in
// ../planes.h. A block owns rows of one head, X and Y of which (K and V, or Q and dO) are in shared memory throughout,
// and walks over tiles of the others, which come by cp.async through a ring of stages. For each tile:
//
//   wait for the tile     S = X X'^T     P = exp(S - lse)     dV += P^T dO     dP = Y Y'^T     dS = P (dP - delta)
//                         dX += dS X'
//
// P and dS, as accumulated, are A operands. With softcap, ALiBi, attn_mask or dropout dP comes before P. The wait ends
// in a barrier, which also says that all warps are done with the tile before: its stage is filled anew.
#pragma once

#include "block.h"
#include "extended.h"

namespace flash_attn::cuda::sm80::fp32 {

/// Block: BackwardBlock<Config>, or what is built on it.
template <typename Config, typename Block>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    backward_kernel(const __grid_constant__ BackwardKernelParams params) {
  if constexpr (Config::kHasCode) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ BackwardTile shared_tile;  // read again wherever it is needed: it would take thirty registers
    __shared__ OtherHeads others;
    {
      BackwardTile tile;
      if (!find_tile<Config>(params, tile)) return;
      if (threadIdx.x == 0) {
        shared_tile = tile;
        others[tile.head_begin] = find_other_head<Config::kOfKeys>(params, tile, tile.head_begin);
      }
    }
    __syncthreads();  // the tile and its first head are there
    constexpr uint32_t kMask = Config::kAlignment - 1;
    Block(params, shared_tile, others, (shared_address(shared) + kMask) & ~kMask).run();
  }
}

}  // namespace flash_attn::cuda::sm80::fp32
