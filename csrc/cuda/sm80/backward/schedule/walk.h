// What the warps of a block share: where they are in their walk over blocks of query rows, and the barriers by which
// they wait for each other.
#pragma once

#include "../../products.h"
#include "../barrier.h"
#include "../config.h"
#include "../tile.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
struct BackwardWalk {
  static constexpr int kStages = Config::kStages;

  const BackwardKernelParams& params;
  const ForwardParams& p;
  const BackwardTile& tile;
  const uint32_t shared;
  int head, m_block, step = 0;

  SM80_DEVICE BackwardWalk(const BackwardKernelParams& kernel_params, const BackwardTile& t, uint32_t shared_memory)
      : params(kernel_params),
        p(kernel_params.problem.forward),
        tile(t),
        shared(shared_memory),
        head(t.head_begin),
        m_block(t.m_start) {}

  // Of this thread; see fresh_thread().
  SM80_DEVICE int lane() const { return int(fresh_thread(step) % 32); }
  SM80_DEVICE int warp() const { return int(fresh_thread(step) / 32); }
  SM80_DEVICE int warp_key() const { return int(fresh_thread(step) / (32 * Config::kWarpsQ)) * Config::kWarpKeys; }
  SM80_DEVICE int warp_q() const { return int(fresh_thread(step) / 32 % Config::kWarpsQ); }

  // -- barriers

  /// Q or dO of a stage, with a row's statistics: there; and no longer needed.
  enum Side { kQ = 0, kDo = 1 };
  SM80_DEVICE uint32_t full(Side side, int stage) const {
    return shared + Config::kBarriers + 16 * stage + (Config::kTogether ? 0 : 8 * side);
  }
  SM80_DEVICE uint32_t empty(Side side, int stage) const { return full(side, stage) + 16 * kStages; }
  SM80_DEVICE uint32_t scores_written() const { return full(kQ, 0) + 32 * kStages; }
  SM80_DEVICE uint32_t scores_read() const { return scores_written() + 8; }
  SM80_DEVICE uint32_t p_read() const { return scores_written() + 16; }  // with a bias
  SM80_DEVICE uint32_t phase() const { return uint32_t(step / kStages) & 1; }

  SM80_DEVICE void init_barriers() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < 2 * kStages; ++s) {
        barrier_init(full(kQ, 0) + 8 * s, Config::kThreads * (Config::kExtended ? 2 : 1));
        barrier_init(empty(kQ, 0) + 8 * s, params.turns != nullptr ? Config::kThreads : Config::kWarps);
      }
      barrier_init(scores_written(), Config::kWarps);
      barrier_init(scores_read(), Config::kWarps);
      if constexpr (Config::kBias) barrier_init(p_read(), Config::kWarps);
    }
    __syncthreads();
  }

  /// At a barrier `empty`. While they wait for their turns, warps drift apart by whole steps; then each lane speaks for
  /// what it has read itself. ptxas leaves out __syncwarp() after ldmatrix, whose lanes are together, and racecheck,
  /// which does not see one, reports that others' reads are not covered by the first lane's arrival.
  SM80_DEVICE void arrive_read(uint32_t barrier) const {
    if (params.turns != nullptr) {
      barrier_arrive(barrier);
    } else {
      barrier_arrive_warp(barrier);
    }
  }

  // -- gradients of ALiBi's slopes

  // dS times distance, summed up over this warp's scores of one head, in shared memory.

  SM80_DEVICE float& slope_sum() const {
    return static_cast<float*>(__cvta_shared_to_generic(shared + Config::kSlopeSums))[warp()];
  }

  SM80_DEVICE void add_slope_sum(float of_lane) const {
    if (params.slope_sums == nullptr) return;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) of_lane += __shfl_xor_sync(~0u, of_lane, distance);
    if (lane() == 0) slope_sum() += of_lane;
  }

  SM80_DEVICE void store_slope_sum(int of_head, float sum) const {
    if (params.slope_sums == nullptr || lane() != 0) return;
    const int64_t block = tile.key_block + int64_t{of_head - tile.head_begin} * params.num_n_blocks;
    params.slope_sums[block * Config::kWarps + warp()] = sum;
    slope_sum() = 0.f;
  }

  // -- steps

  /// To the next step. False: there is none.
  SM80_DEVICE bool advance(int& of_head, int& block) const {
    do {
      if (++block == tile.m_begin + tile.num_m_blocks) block = tile.m_begin;
      if (block == tile.m_start && ++of_head >= tile.head_end) return false;
    } while (Config::kMasks && is_hidden<Config>(params, tile, of_head, block));
    return true;
  }

  /// Number of a block of query rows in dq_accum and the statistics.
  SM80_DEVICE int64_t accum_block(int of_head, int block) const {
    return tile.first_m_block + (of_head - tile.head_begin) * params.num_m_blocks + block;
  }
};

}  // namespace flash_attn::cuda::sm80
