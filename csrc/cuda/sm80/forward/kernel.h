// Forward: FlashAttention-2's order (Dao 2023, arXiv:2307.08691, algorithm 1). A block owns kBlockM query rows of one
// head and walks over the tiles of keys that they see, the last ones first. Tiles of K and V come by cp.async through a
// ring of slots in shared memory: K, V of the first tile, K, V of the second, ...
//
//   S = Q K^T        rescale by S        wait for V        P = exp(S), O += P V        wait for the next K
//
// S of a whole tile is in registers; what overlaps are the warps of an SM, and exponentials with products (kBeside).
// Where registers do not hold O of 32 rows, warps have rows in common (kWarpsD): each has S of other keys and O of
// other columns, maxima and P go through shared memory:
//
//   maxima of all keys        P = exp(S) to shared memory   wait for V     O += P V, own columns
//
// Each wait ends in a barrier, which also says that all warps are done with an earlier tile: its slot is filled anew.
#pragma once

#include "block.h"
#include "epilogue.h"
#include "loading.h"
#include "rows_in_common.h"
#include "schedule/visited_tiles.h"
#include "scores/bias_tiles.h"
#include "scores/rules.h"
#include "scores/unseen_values.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    forward_kernel(const __grid_constant__ ForwardKernelParams params) {
  if constexpr (Config::kHasCode) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ uint4 alive[ForwardBlock<Config>::kAliveWords / 4];
    __shared__ ForwardTile shared_tile;  // read again wherever it is needed: it would take twenty registers
    {
      ForwardTile tile;
      if (!find_tile<Config::kBlockM, Config::kBlockN>(params, tile)) return;
      if (threadIdx.x == 0) {
        if (Config::kRules == Rules::kDropout) {
          tile.dropout = make_dropout(params.problem.rng_state, params.problem.dropout_p);
        }
        if constexpr (Config::kBias) {
          const MaskView& mask = params.problem.mask;
          tile.mask = static_cast<const char*>(mask.data) + 2 * (tile.batch * mask.batch + tile.head * mask.head) +
                      tile.m_begin * params.mask_row;
        }
        shared_tile = tile;
      }
    }
    __syncthreads();  // the tile is there
    ForwardBlock<Config>(params, shared_tile, shared, reinterpret_cast<uint32_t*>(alive)).run();
  } else {
    __trap();
  }
}

}  // namespace flash_attn::cuda::sm80
