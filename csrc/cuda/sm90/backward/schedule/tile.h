// A tile is kBlockN rows of k and v of one key head, with the query rows that see them, of the query heads that read
// this key head. Where this would make too few tiles a key head's work is split into parts (HeadSplit): each has some
// of these heads, or some of one head's rows, and its own dk and dv, which are added up afterwards. The scheduler turns
// an index in the order of tiles (schedule/order.h) into a Tile, the other warps work on that alone.
#pragma once

#include "../../../common/ptx.h"
#include "../../../common/tiles/visibility.h"
#include "order.h"

namespace flash_attn::cuda::sm90::backward {

/// Lives in shared memory. `m` counts blocks of kBlockM query rows.
struct Tile {
  int num_heads;           // query heads; -1: no more tiles
  int index;               // in the order of tiles
  int batch_head;          // of k, once for each part
  int m_begin, m_end;      // query blocks that see the tile; none: dk = dv = 0
  int m_first;             // which of them comes first, see first_block_of_tile
  int block;               // index of the first head's block 0 in dq_accum and statistics
  int n_begin;             // first row of k, in the sequence
  int prepared_blocks;     // of queries, that the tile prepares for later ones, see RowPreparation
  int awaited_blocks;      // of each of its heads, that tiles before it prepare
  int seqlen_q, seqlen_k;  // rows from here on take no part
  int right, left;         // row r sees columns [r + left, r + right], see Band
  // TMA coordinates (tensor_map.h): of block 0 of q and dout, of the tile's first row of k, v and of dk, dv.
  int q_x, q_y, q_head, q_batch;
  int kv_x, kv_y, dkv_x, dkv_y, kv_head, dkv_head, kv_batch;
  int m_step;  // from a query block to the next, 1 or -1, where Config::kDescends: see tiles_before
  int number;  // see TilePlace

  FLASH_ATTN_DEVICE Band band() const { return {right, left, seqlen_k, seqlen_q}; }
};

// If it is even ptxas joins the loads of the bounds, packs dS later and puts up to six instructions more into the
// loops: benchmarks/experiments/058.
static_assert(sizeof(Tile) / sizeof(int) % 2 == 1, "a tile's number of words is odd: add or take one away");

/// Where all tiles of a head see all query blocks, each begins with another: if all began with the first, they would
/// come to each block at the same time and wait for the one that stores there, see claim_block.
FLASH_ATTN_DEVICE int first_block_of_tile(int n_block, int n_blocks, int m_blocks) {
  return min(static_cast<int>(__fdividef(static_cast<float>(n_block) * m_blocks, n_blocks)), m_blocks - 1);
}

/// From a query block to the next.
template <typename Config>
FLASH_ATTN_DEVICE int block_step(const Tile& tile) {
  return Config::kDescends ? tile.m_step : 1;
}

/// Leaves of the tile's query blocks those of its part.
template <typename Config>
FLASH_ATTN_DEVICE void take_part_of_rows(const KernelParams& params, Tile& tile) {
  asm volatile("" ::: "memory");  // reads the fields back: the scheduler has no registers for them
  const int parts = params.split.row_parts.value, begin = tile.batch_head % parts * params.split.part_blocks;
  const int m_end = min(tile.m_end, begin + params.split.part_blocks), m_begin = min(max(tile.m_begin, begin), m_end);
  int m_first = m_begin;
  if (block_step<Config>(tile) < 0) {
    m_first = m_end - 1;
  } else if (params.spread_starts) {
    m_first = max(min(begin + params.split.row_parts.divide(tile.m_first), m_end - 1), m_begin);
  }
  tile.m_first = m_first;
  tile.m_begin = m_begin;
  tile.m_end = m_end;
}

/// False if there are no more. Writes field by field to shared memory: the scheduler has few registers. Without lengths
/// on the device it reads 32-bit parameters alone, because a CTA's first tile waits for this.
template <typename Config>
FLASH_ATTN_DEVICE bool make_tile(const KernelParams& params, int index, Tile& tile) {
  constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  if (index >= params.schedule.num_tiles) return false;
  tile.index = index;
  {
    TilePlace at;
    if (!find_place(params, index, at)) return false;
    tile.number = at.number();
    tile.batch_head = at.batch_head;
    tile.n_begin = at.n_block * kBlockN;
    if constexpr (Config::kDescends) tile.m_step = at.in_last && params.is_ordered() ? -1 : 1;
  }
  asm volatile("" ::: "memory");  // what led to them needs no registers any more
  const int batch_head = tile.batch_head, n_begin = tile.n_begin;
  const int b = params.split.heads.divide(batch_head);
  const int head_k = batch_head - b * static_cast<int>(params.split.heads.value);

  int seqlen_q = params.seqlen_q, seqlen_k = params.seqlen_k, diagonal;
  int block = head_k * params.split.heads_of_tile * params.num_blocks;
  if constexpr (Config::kRowParts) {
    tile.q_head = params.split.row_parts.divide(head_k);
    block = tile.q_head * params.num_blocks;
  }
  tile.q_batch = tile.kv_batch = b;
  if (params.dense) {
    diagonal = params.problem.causal == Causal::kTopLeft ? 0 : seqlen_k - seqlen_q;
    tile.q_x = 0;
    tile.q_y = seqlen_q;
    tile.kv_x = tile.dkv_x = n_begin;
    tile.kv_y = tile.dkv_y = seqlen_k;
    block += b * params.num_m_blocks;
  } else {
    const ForwardParams& p = params.problem;
    const SequenceInfo info = sequence_info(p, b);
    const int q_row = static_cast<int>(info.q_row), k_row = static_cast<int>(info.k_row);
    const int seqlen_k_padded = static_cast<int>(info.seqlen_k_padded);
    tile.dkv_x = seqlen_k - seqlen_k_padded + n_begin;
    tile.dkv_y = k_row + seqlen_k_padded;
    block += static_cast<int>(first_block(p, info, b, kBlockM, params.num_m_blocks));
    diagonal = static_cast<int>(info.diagonal);
    tile.q_x = seqlen_q - static_cast<int>(info.seqlen_q);
    tile.kv_x = seqlen_k - static_cast<int>(info.seqlen_k) + n_begin;
    seqlen_q = static_cast<int>(info.seqlen_q);
    seqlen_k = static_cast<int>(info.seqlen_k);
    tile.q_y = q_row + seqlen_q;
    tile.kv_y = k_row + seqlen_k;
    if (p.cu_seqlens_q != nullptr) tile.q_batch = 0;
    if (p.cu_seqlens_k != nullptr) tile.kv_batch = 0;
  }

  Band band{right_bound(params.window_right, diagonal), left_bound(params.window_left, diagonal), seqlen_k, seqlen_q};
  if constexpr (Config::kBand) {
    band.right = params.condition.band().right;
    band.left = params.condition.band().left;
  }
  const IntRange seeing = band.row_blocks<kBlockM>(n_begin, n_begin + kBlockN);
  tile.m_begin = seeing.begin;
  tile.m_end = seeing.end;
  tile.m_first = block_step<Config>(tile) > 0 ? tile.m_begin : tile.m_end - 1;
  if (params.spread_starts && !seeing.empty()) {
    tile.m_first = first_block_of_tile(n_begin / kBlockN, (seqlen_k + kBlockN - 1) / kBlockN, tile.m_end);
  }
  tile.right = band.right;
  tile.left = band.left;
  tile.seqlen_q = seqlen_q;
  tile.seqlen_k = seqlen_k;
  tile.block = block;
  tile.num_heads = params.split.heads_of_tile;
  if constexpr (!Config::kRowParts) tile.q_head = head_k * params.split.heads_of_tile;
  tile.kv_head = params.split.parts.divide(head_k);
  tile.dkv_head = Config::kRowParts ? 2 * head_k : head_k;
  if constexpr (Config::kRowParts) take_part_of_rows<Config>(params, tile);
  return true;
}

}  // namespace flash_attn::cuda::sm90::backward
