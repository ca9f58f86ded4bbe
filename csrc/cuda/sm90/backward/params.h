// What the host gives to a backward kernel.
#pragma once

#include <cuda.h>
#include <vector_types.h>

#include "../../../mask_kind.h"
#include "../../../sequence.h"
#include "../../common/division.h"
#include "../../common/tiles/sequence_blocks.h"
#include "dq/protocol.h"
#include "extended/params.h"

namespace flash_attn::cuda::sm90::backward {

/// A block of keys of packed sequences, which lie one behind the other.
struct alignas(16) PackedBlock {
  int sequence;      // -1: there are no more
  int first, count;  // blocks before those of its sequence, and of it
  int in_last;       // in the last group, for few tiles come after those of its sequence
};

/// The order of tiles: groups of heads, one after the other; within a group the first columns of all its heads, then
/// their neighbours. DqPath::kOneCta: all tiles of a head, then the next head.
struct Schedule {
  int num_batch_heads;  // of k, each counted once for each part
  int num_n_blocks;     // tiles of a head; of the longest sequence
  int num_tiles;        // packed: no more than this
  int heads_per_group;  // worked on together, so that their Q, dO and dQ stay in L2
  int grouped_heads;    // the heads after these are one group, the last: its longest tiles come first in causal
                        // attention, so that all CTAs finish together
  bool falling;         // the last columns first, but not in the last group
  int* next_tile;       // or next head with DqPath::kOneCta, 0 when the kernel starts; null: CTA i takes tile i alone
  // With cu_seqlens_k: (num_key_blocks + 1), of which the last says in `first` how many there are. Groups are of one
  // sequence's heads then.
  const PackedBlock* packed_blocks;
  int num_key_blocks;  // num_tiles / heads
  bool wide_groups;    // packed: heads_per_group is as many as have tiles_at_once tiles
  int tiles_at_once;   // how many tiles the GPU works on
};

/// How the work on a key head is split: tiles share out the query heads that read it; or each has one head, or a part
/// of that head's rows. Each part adds up its own dk and dv, which another launch adds up.
struct HeadSplit {
  Divisor heads;      // key heads, each counted once for each part
  Divisor parts;      // of a key head
  Divisor row_parts;  // with Config::kRowParts: of a query head's rows
  int part_blocks;    // and the query blocks of each
  int heads_of_tile;  // query heads
};

/// How the main kernel itself turns dq_accum to dq, see dq/writer.h.
struct DqWriting {
  // (num_tiles), 0 at first: which have added all their dQ. Null: another launch turns dq_accum to dq afterwards.
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
  bool zeroes_dq;   // dq_accum: DqProtocol::kZeroed
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
                    // with DqPath::kOneCta (CTAs, query heads, num_m_blocks, ...)
  TensorView dq;
  DqWriting dq_writing;
  RowPreparation preparation;
  bool spread_starts;  // tiles of a head begin with different query blocks, see first_block_of_tile
  DqProtocol dq_protocol;
  BlockCounters* dq_counters;  // (num_heads * num_blocks), 0 at first: of dq_protocol, null if it has none
  uint4* statistics;           // (num_heads * num_blocks, kBlockM), see preprocess/statistics.h
  // Of problem, in 32 bits.
  int window_left, window_right, seqlen_q, seqlen_k;
  int panels,
      panels_v;  // of 64 columns that q, k and v, dout have: a box beyond them must not be loaded (tensor_map.h)
  bool dense;    // all sequences are of seqlen_q and seqlen_k
  HeadSplit split;
  Divisor n_blocks, group_tiles, heads_per_group;
  float softmax_scale, inverse_scale, scale_log2;  // inverse: 1 / softmax_scale; log2: softmax_scale / ln 2
  bool wants_dk, wants_dv;
  ExtendedParams extended;        // of the kernels of extended/ alone
  mask::KindCondition condition;  // of these, and of those with Config::kBand, whose rows see its band

  FLASH_ATTN_HOST_DEVICE bool is_ordered() const { return dq_protocol == DqProtocol::kOrdered; }
  FLASH_ATTN_HOST_DEVICE bool has_turns() const { return dq_counters != nullptr; }
};

/// Of dq_accum and statistics, of head 0.
FLASH_ATTN_HOST_DEVICE int64_t first_block(const ForwardParams& p, const SequenceInfo& info, int64_t b, int block_m,
                                           int64_t num_m_blocks) {
  return p.cu_seqlens_q != nullptr ? first_packed_block(info.q_row, b, block_m) : b * num_m_blocks;
}

}  // namespace flash_attn::cuda::sm90::backward
