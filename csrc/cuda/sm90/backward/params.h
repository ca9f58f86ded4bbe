// What the host gives to a backward kernel.
#pragma once

#include <cuda.h>
#include <vector_types.h>

#include "../../../sequence.h"

namespace flash_attn::cuda::sm90::backward {

/// A block of keys of packed sequences, which lie one behind the other.
struct alignas(16) PackedBlock {
  int sequence;      // -1: there are no more
  int first, count;  // blocks before those of its sequence, and of it
  int in_last;       // in the last group, for few tiles come after those of its sequence
};

/// The order of tiles: groups of heads, one after the other; within a group the first columns of all its heads, then
/// their neighbours. Shape::kFusedDq: all tiles of a head, then the next head.
struct Schedule {
  int num_batch_heads;  // of k, each counted key_parts times
  int num_n_blocks;     // tiles of a head; of the longest sequence
  int num_tiles;        // packed: no more than this
  int heads_per_group;  // worked on together, so that their Q, dO and dQ stay in L2
  int grouped_heads;    // the heads after these are one group, the last: its longest tiles come first in causal
                        // attention, so that all CTAs finish together
  bool falling;         // the last columns first, but not in the last group
  int* next_tile;       // or next head with kFusedDq, 0 when the kernel starts; null: CTA i takes tile i alone
  // With cu_seqlens_k: (num_key_blocks + 1), of which the last says in `first` how many there are. Groups are of one
  // sequence's heads then.
  const PackedBlock* packed_blocks;
  int num_key_blocks;  // num_tiles / heads
  bool wide_groups;    // packed: heads_per_group is as many as have tiles_at_once tiles
  int tiles_at_once;   // how many tiles the GPU works on
};

/// Division of 0 <= n < 2^31 by a divisor that the host knows (Granlund and Montgomery, 1994, figure 4.1).
struct FastDivision {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  FastDivision() = default;
  explicit FastDivision(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d) + 1;
  }
  FLASH_ATTN_HOST_DEVICE int quotient(int n) const {
#ifdef __CUDA_ARCH__
    return static_cast<int>((__umulhi(n, multiplier) + n) >> shift);
#else
    return static_cast<int>(((uint64_t{static_cast<uint32_t>(n)} * multiplier >> 32) + n) >> shift);
#endif
  }
};

/// How the main kernel itself turns dq_accum to dq, see dq/writer.h.
struct DqWriting {
  // (num_tiles), 0 at first: which have added all their dQ. Null: store_dq turns dq_accum afterwards.
  int* added;
  int lag;             // who takes tile i, in the order of tiles, writes the share of tile i - lag
  bool by_last_block;  // how a head's query blocks are shared out, see share_begin()
  FLASH_ATTN_HOST_DEVICE bool enabled() const { return added != nullptr; }
};

/// How the main kernel itself prepares query rows, see preprocess/prepared_rows.h.
struct RowPreparation {
  CUtensorMap out;  // boxes of a block's rows
  RowView dlse;     // data null: none
  int* prepared;    // (batch * num_heads), 0 at first: how many blocks of a head are done; null: all, by another launch
  int ahead;        // tile i, in their order, prepares the share of tile number i + ahead; another launch those before
  bool zeroes_dq;   // dq_accum, where dq_turns is null
  FLASH_ATTN_HOST_DEVICE bool enabled() const { return prepared != nullptr; }
};

/// Query rows that a tile can prepare.
constexpr int kMaxPreparedRows = 1024;

struct KernelParams {
  CUtensorMap q, dout, k, v, dk, dv, dq_rows;  // see tensor_map.h; dk and dv in boxes of 16 rows, dq_rows of 32
  ForwardParams problem;
  Schedule schedule;
  // Query rows in whole blocks: block m of sequence b and head h has index h * num_blocks + first_block(b) + m.
  int num_blocks, num_m_blocks;  // of a head over all sequences; of the longest sequence
  float* dq_accum;  // (num_heads * num_blocks, kBlockM, head dimension in whole panels of 64), see kDqTile;
                    // of Config::kFusedDq (CTAs, query heads, num_m_blocks, ...)
  TensorView dq;
  DqWriting dq_writing;
  RowPreparation preparation;
  bool spread_starts;  // tiles of a head begin with different query blocks, see first_block_of_tile
  bool ordered_dq;     // tiles add to dq_accum one by one in a fixed order, so that the sum is the same every time
  // (num_heads * num_blocks, kDqTurns), 0 at first, see dq/turns.h: with ordered_dq how many tiles have added,
  // else a state of claim_block(). Null where dq_accum is 0 at first.
  int* dq_turns;
  uint4* statistics;  // (num_heads * num_blocks, kBlockM), see preprocess/statistics.h
  // Of problem, in 32 bits.
  int window_left, window_right, seqlen_q, seqlen_k;
  int group_size;  // query heads of a tile
  int panels,
      panels_v;  // of 64 columns that q, k and v, dout have: a box beyond them must not be loaded (tensor_map.h)
  bool dense;    // all sequences are of seqlen_q and seqlen_k
  FastDivision heads_k, key_parts;  // heads_k: num_heads_k * key_parts
  FastDivision n_blocks, group_tiles, heads_per_group;
  float softmax_scale, inverse_scale, scale_log2;  // inverse: 1 / softmax_scale; log2: softmax_scale / ln 2
  bool wants_dk, wants_dv;
  // With Config::kRowParts: the parts of a head's rows, and the query blocks of each.
  FastDivision row_parts;
  int part_blocks;
};

/// With cu_seqlens, sequence b of n rows has n / kBlockM rounded up blocks: these never reach into those of b + 1.
FLASH_ATTN_HOST_DEVICE int64_t first_block(const ForwardParams& p, const SequenceInfo& info, int64_t b, int block_m,
                                           int64_t num_m_blocks) {
  return p.cu_seqlens_q != nullptr ? info.q_row / block_m + b : b * num_m_blocks;
}

/// dq_accum holds a block as 64 x 64 tiles, by rows then by columns, each in the order of a wgmma accumulator: (warp,
/// 8 columns, lane, 4). So a warp adds 512 contiguous bytes at a time.
constexpr int kDqTile = 64 * 64;

/// Half a tile of kDqTile, the unit in which the main kernel turns dq_accum to dq.
constexpr int kDqPieceRows = 32, kDqPiece = kDqPieceRows * 64;

/// Parts of a block of dq_accum whose fixed order is kept apart: one for each CTA of a tile, or each dQ warp.
constexpr int kDqTurns = 2;

}  // namespace flash_attn::cuda::sm90::backward
