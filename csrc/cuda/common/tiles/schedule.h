// How the host asks for the tiles of a forward pass to be shared out over the CTAs; order.h is what the device
// makes of it.
#pragma once

#include <vector_types.h>

#include "../../../sequence.h"
#include "../division.h"

namespace flash_attn::cuda {

/// See open_counter() of counter.h.
struct TileCounter {
  uint64_t launch_id;
  int value;
};

struct TileSchedule {
  enum Order : int {
    kRowsFirst,     // all tiles of a head, then the next head: neighbours share K and V
    kLongestFirst,  // for causal attention: see place_longest_first()
    kPacked,        // with cu_seqlens_q: sequence by sequence, head by head, last rows first
  };
  Order order;
  Divisor num_m_blocks;  // of a sequence; kPacked: of the longest
  Divisor num_heads;
  Divisor queries_per_head;  // query heads that read the same K and V
  int num_tiles;             // kPacked: first_m_block[batch] * num_heads instead

  // kLongestFirst: heads worked on together, so that their K and V stay in L2, and their tiles but the shortest.
  Divisor heads_per_group, group_tiles, batch_heads;

  bool alike;  // no lengths on the device: every sequence is as `sequence` says
  SequenceInfo sequence;

  // Tiles from split_begin on are cut into num_splits parts along their columns, one index each. What they compute is
  // put together by combine.h.
  int split_begin, num_splits;
  float* partial_out;          // (split tiles, parts, kBlockM, kHeadDimV), O before the division
  float2* partial_statistics;  // (split tiles, parts, kBlockM): row_max, row_sum; see CombineParams

  TileCounter* next_tile;  // null: CTA i takes tiles i, i + gridDim.x, ...
  int* first_m_block;      // kPacked: (batch + 1), query blocks of all sequences before b; written by prepare.h
};

}  // namespace flash_attn::cuda
