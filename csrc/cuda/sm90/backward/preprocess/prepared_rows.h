// The products need its statistics (preprocess/statistics.h) of every query row, for which out and dO are read, and at
// head dimension 64 zeros in dq_accum. A launch of its own for that takes up to a fifth of the whole at short
// sequences: it is bound by memory, which the products leave idle. So it prepares only the first heads; every tile
// prepares some blocks of later heads:
//
//   producer   out and dO of a block to the next stage of Q and dO
//   consumers  delta, before the tile's own steps, while K and V are on their way
//   scheduler  statistics of delta and lse, zeros, and counts the block; before a tile begins, waits until all blocks
//              of its heads are counted
//
// In the kernels of two CTAs (pair/kernel.h) these share out the blocks, consumers write the statistics, a
// thread of its own chooses, copies and counts them, and the producer waits for the blocks of a head.
//
// A tile prepares the share (schedule/shares.h) of another one, RowPreparation::ahead further on.
#pragma once

#include "../../../common/counters.h"
#include "../../../common/swizzle.h"
#include "../params.h"
#include "../schedule/shares.h"
#include "../schedule/tile.h"
#include "statistics.h"

namespace flash_attn::cuda::sm90::backward {

/// Which share the tile at this index prepares. Its number of blocks, of all heads together.
template <typename Config>
FLASH_ATTN_DEVICE int choose_prepared(const KernelParams& params, int index, QueryShare& share) {
  TilePlace at;
  const int number = index + params.preparation.ahead;
  if (number >= params.schedule.num_tiles || !find_number(params, number, at)) return 0;
  choose_share<Config>(params, at, false, share);
  return (share.end - share.begin) * params.split.heads_of_tile;
}

/// How many blocks of each of the tile's heads tiles before it prepare: of a head of the dense batch all or none.
template <typename Config>
FLASH_ATTN_DEVICE int count_awaited(const KernelParams& params, const Tile& tile) {
  constexpr int kBlockM = Config::kBlockM, kBlocksBeside = Config::kBlockN / kBlockM;
  const int blocks = (tile.seqlen_q + kBlockM - 1) / kBlockM;
  const int before =
      max(0, params.preparation.ahead - tile.number + tile.n_begin / Config::kBlockN);  // tiles of the head
  return params.dense ? (before == 0 ? blocks : 0) : max(0, blocks - before * kBlocksBeside);
}

/// Where the blocks of a query head are counted.
FLASH_ATTN_DEVICE int* prepared_count(const KernelParams& params, int batch_head, int head) {
  return params.preparation.prepared + batch_head * params.split.heads_of_tile + head;
}

/// Until all blocks of the tile's head are prepared.
FLASH_ATTN_DEVICE void await_prepared(const KernelParams& params, const Tile& tile, int head) {
  if (tile.awaited_blocks > 0) wait_for_count(prepared_count(params, tile.batch_head, head), tile.awaited_blocks);
}

/// Of a block of a share: the first row's place in `view`.
FLASH_ATTN_DEVICE const float* first_of(const RowView& view, const QueryShare& share, const BlockOfShare& at,
                                        int block_m) {
  const int64_t row = share.row + at.m_block * block_m;
  return static_cast<const float*>(view.data) + share.q_batch * view.batch + (share.q_head + at.head) * view.head +
         row * view.row;
}

/// By a warp: zeros in dq_accum for a block of `kFloat4s`.
template <int kFloat4s>
FLASH_ATTN_DEVICE void zero_block(const KernelParams& params, int block) {
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

  FLASH_ATTN_DEVICE static int panel(int thread) { return thread % kThreadsOfRow * kChunks / 8; }

  /// delta of row thread / kThreadsOfRow, by all threads of the row, with their panels of out and dO; `some`: there is
  /// such a panel.
  FLASH_ATTN_DEVICE static float delta(const uint8_t* out, const uint8_t* dout, int thread, bool some) {
    const int row = thread / kThreadsOfRow, first = thread % kThreadsOfRow * kChunks % 8, turn = 2 * panel(thread);
    const uint32_t offset = row * 128;
    float sum = 0.f;
    if (some) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        // What eight neighbours read at a time lies in different banks.
        const int chunk = swizzled_chunk(first + (i ^ turn % kChunks), row);
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
  int* count;     // of its head
  int rows_left;  // of the sequence, from its first on
  int block;      // index in statistics and dq_accum
  const float *lse, *dlse;
};

}  // namespace flash_attn::cuda::sm90::backward
