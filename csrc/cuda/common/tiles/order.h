// The order in which the tiles of a forward pass are worked on: which query rows of which head a tile has. A tile is
// kBlockM query rows of one head.
#pragma once

#include "../ptx.h"
#include "schedule.h"

namespace flash_attn::cuda {

FLASH_ATTN_DEVICE int num_work_items(const TileSchedule& s, const ForwardParams& p) {
  if (s.order == TileSchedule::kPacked) return s.first_m_block[p.batch] * static_cast<int>(s.num_heads.value);
  return s.num_tiles + (s.num_tiles - s.split_begin) * (s.num_splits - 1);
}

struct TilePlace {
  int m_block, head, batch;
};

/// Longest first: within a group of heads the last rows of all heads, then the rows before them, and so on. The
/// shortest quarter of all heads' tiles comes at the very end, where short tiles even out when the CTAs finish.
FLASH_ATTN_DEVICE TilePlace place_longest_first(const TileSchedule& s, int index) {
  const int num_m_blocks = s.num_m_blocks.value, batch_heads = s.batch_heads.value;
  const int short_blocks = num_m_blocks / 4;
  const int rest = index - batch_heads * (num_m_blocks - short_blocks);
  int from_last, batch_head;
  if (rest >= 0) {
    from_last = num_m_blocks - short_blocks + s.batch_heads.divide(rest, batch_head);
  } else {
    int in_group;
    const int first_head = s.group_tiles.divide(index, in_group) * s.heads_per_group.value;
    const int heads = batch_heads - first_head;
    if (heads >= static_cast<int>(s.heads_per_group.value)) {
      from_last = s.heads_per_group.divide(in_group, batch_head);
    } else {
      from_last = in_group / heads;
      batch_head = in_group % heads;
    }
    batch_head += first_head;
  }
  TilePlace place;
  place.m_block = num_m_blocks - 1 - from_last;
  place.batch = s.num_heads.divide(batch_head, place.head);
  return place;
}

FLASH_ATTN_DEVICE TilePlace packed_place(const TileSchedule& s, int batch, int index) {
  const int m = s.num_heads.divide(index);
  int low = 0, high = batch;  // first_m_block[low] <= m < first_m_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (s.first_m_block[middle] <= m ? low : high) = middle;
  }
  const int first = s.first_m_block[low];
  const int m_blocks = s.first_m_block[low + 1] - first;
  const int in_sequence = index - first * static_cast<int>(s.num_heads.value);
  return {m_blocks - 1 - in_sequence % m_blocks, in_sequence / m_blocks, low};
}

FLASH_ATTN_DEVICE TilePlace tile_place(const TileSchedule& s, const ForwardParams& p, int index) {
  if (s.order == TileSchedule::kLongestFirst) return place_longest_first(s, index);
  if (s.order == TileSchedule::kPacked) return packed_place(s, static_cast<int>(p.batch), index);
  TilePlace place;
  const int batch_head = s.num_m_blocks.divide(index, place.m_block);
  place.batch = s.num_heads.divide(batch_head, place.head);
  return place;
}

}  // namespace flash_attn::cuda
