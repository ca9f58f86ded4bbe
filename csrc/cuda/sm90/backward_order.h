// The order in which tiles are worked on, see BackwardSchedule. A tile waits for others: for those before it in its
// turn to add to a block of dq (backward_turns.h), for those that prepare its query rows (backward_prepare.h), and a
// CTA's dq writer for those that add to a share (backward_dq.h). Tickets are drawn in this order, so all of them come
// before it: tests/backward_order.cu.
#pragma once

#include "backward_params.h"

namespace flash_attn::sm90 {

struct BackwardTilePlace {
  int n_block, batch_head;
  bool in_last;  // in the last group
};

/// Of dense sequences.
FLASH_ATTN_HOST_DEVICE BackwardTilePlace place_in_group(const BackwardKernelParams& params, int index) {
  const BackwardSchedule& schedule = params.schedule;
  int first_head = params.group_tiles.quotient(index) * schedule.heads_per_group;
  const bool in_last = first_head >= schedule.grouped_heads;
  if (in_last) first_head = schedule.grouped_heads;
  const int in_group = index - first_head * schedule.num_n_blocks;
  const int heads = in_last ? schedule.num_batch_heads - first_head : schedule.heads_per_group;
  const int n_block = in_last ? in_group / heads : params.heads_per_group.quotient(in_group);
  const bool falling = schedule.falling && !in_last;
  return {falling ? schedule.num_n_blocks - 1 - n_block : n_block, first_head + in_group - n_block * heads, in_last};
}

/// The same, sequence by sequence.
FLASH_ATTN_HOST_DEVICE BackwardTilePlace place_packed(const BackwardKernelParams& params, const PackedBlock& block,
                                                      int index) {
  const BackwardSchedule& schedule = params.schedule;
  const int all_heads = params.heads_k.divisor;
  const bool in_last = block.in_last != 0;
  const int wanted = in_last || schedule.wide_groups ? schedule.tiles_at_once / block.count : schedule.heads_per_group;
  const int heads_per_group = min(max(wanted, 1), all_heads);
  index -= block.first * all_heads;
  const int first_head = index / (heads_per_group * block.count) * heads_per_group;
  index -= first_head * block.count;
  const int heads = min(heads_per_group, all_heads - first_head);
  const int n_block = index / heads;
  return {schedule.falling && !in_last ? block.count - 1 - n_block : n_block,
          block.sequence * all_heads + first_head + index - n_block * heads, in_last};
}

}  // namespace flash_attn::sm90
