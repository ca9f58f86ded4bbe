// The products need its statistics (backward_statistics.h) of every query row, for which out and dO are read, and at
// head dimension 64 zeros in dq_accum. A launch of its own for that takes up to a fifth of the whole at short
// sequences: it is bound by memory, which the products leave idle. So it prepares only the first heads; every tile
// prepares some blocks of later heads:
//
//   producer   out and dO of a block to the next stage of Q and dO
//   consumers  delta, before the tile's own steps, while K and V are on their way
//   scheduler  statistics of delta and lse, zeros, and counts the block; before a tile begins, waits until all blocks
//              of its heads are counted
//
// In the kernels of two CTAs (backward_pair_kernel.h) these share out the blocks, consumers write the statistics, a
// spare thread counts, and the producer waits for the blocks of a head.
//
// Blocks are shared out in the order of tiles, so far ahead that a tile waits for tiles before it alone: waiting ends.
#pragma once

#include "backward_params.h"
#include "backward_ptx.h"
#include "backward_statistics.h"
#include "backward_turns.h"

namespace flash_attn::sm90 {

/// Which blocks the tile prepares.
SM90_DEVICE void choose_prepared(const RowPreparation& p, BackwardTile& tile) {
  const int first = p.first_head * static_cast<int>(p.num_m_blocks.divisor) + tile.index * p.blocks_per_tile;
  tile.prepared_begin = min(first, p.num_blocks);
  tile.prepared_end = min(first + p.blocks_per_tile, p.num_blocks);
}

/// Until all blocks of the tile's head are prepared.
SM90_DEVICE void await_prepared(const RowPreparation& p, const BackwardTile& tile, int head) {
  head += tile.q_batch * static_cast<int>(p.num_heads.divisor) + tile.q_head;
  if (head < p.first_head) return;
  wait_for_count(p.prepared + head, static_cast<int>(p.num_m_blocks.divisor));
}

/// Where a block is that a tile prepares.
struct PreparedPlace {
  int all_heads;  // its head, counting all batches'
  int batch, head;
  int m_block;  // in the head
  int block;    // of statistics and dq_accum
};

SM90_DEVICE PreparedPlace prepared_place(const BackwardKernelParams& params, int index) {
  const RowPreparation& p = params.preparation;
  PreparedPlace at;
  at.all_heads = p.num_m_blocks.quotient(index);
  at.m_block = index - at.all_heads * params.num_m_blocks;
  at.batch = p.num_heads.quotient(at.all_heads);
  at.head = at.all_heads - at.batch * static_cast<int>(p.num_heads.divisor);
  at.block = at.head * params.num_blocks + at.batch * params.num_m_blocks + at.m_block;
  return at;
}

SM90_DEVICE const float* first_of(const RowView& view, const PreparedPlace& at, int row) {
  return static_cast<const float*>(view.data) + at.batch * view.batch + at.head * view.head + row * view.row;
}

/// By a warp: zeros in dq_accum for a block of `kFloat4s`.
template <int kFloat4s>
SM90_DEVICE void zero_block(const BackwardKernelParams& params, int block) {
  float4* const to = reinterpret_cast<float4*>(params.dq_accum) + int64_t{block} * kFloat4s;
#pragma unroll 4
  for (int i = lane_id(); i < kFloat4s; i += 32) to[i] = {0.f, 0.f, 0.f, 0.f};
}

/// How kThreads share out the rows of a block of out and dO, both [panel][kRows][64].
template <typename Element, int kThreads, int kRows, int kPanels>
struct PreparedRows {
  static constexpr int kThreadsOfRow = kThreads / kRows;
  static constexpr int kChunks = kThreadsOfRow >= 2 * kPanels ? 4 : 8;  // of 16 bytes a thread: half of a panel, or all
  static_assert(kThreadsOfRow * kChunks >= 8 * kPanels, "all of a row");

  SM90_DEVICE static int panel(int thread) { return thread % kThreadsOfRow * kChunks / 8; }

  /// delta of row thread / kThreadsOfRow, by all threads of the row, with their panels of out and dO; `some`: there is
  /// such a panel.
  SM90_DEVICE static float delta(const uint8_t* out, const uint8_t* dout, int thread, bool some) {
    const int row = thread / kThreadsOfRow, first = thread % kThreadsOfRow * kChunks % 8, turn = 2 * panel(thread);
    const uint32_t offset = row * 128;
    float sum = 0.f;
    if (some) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        // 128-byte swizzle; what eight neighbours read at a time lies in different banks.
        const int chunk = (first + (i ^ turn % kChunks)) ^ row % 8;
        uint4 x, y;
        load_shared(shared_address(out) + offset + 16 * chunk, &x.x);
        load_shared(shared_address(dout) + offset + 16 * chunk, &y.x);
        sum = dot8<Element>(x, y, sum);
      }
    }
#pragma unroll
    for (int distance = 1; distance < kThreadsOfRow; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    return sum;
  }
};

/// A block of query rows that the scheduler's warp is preparing.
struct PreparedBlock {
  int head;       // counting all batches'
  int row;        // the first in the sequence
  int first_row;  // of statistics and dq_accum
  const float *lse, *dlse;
};

}  // namespace flash_attn::sm90
