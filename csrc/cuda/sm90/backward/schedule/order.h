// The order in which tiles are worked on, see Schedule. A tile waits for others: for those before it in its
// turn to add to a block of dq (dq/turns.h), for those that prepare its query rows (preprocess/prepared_rows.h), and a
// CTA's dq writer for those that add to a share (dq/writer.h). Tickets are drawn in this order, so all of them come
// before it: tests/backward_order.cu.
#pragma once

#include "../params.h"

namespace flash_attn::cuda::sm90::backward {

/// Tiles are numbered head by head, those of a head by columns.
struct TilePlace {
  int n_block, batch_head;
  int first, count;  // of the head's tiles: the first one's number, and how many there are
  bool in_last;      // in the last group
  FLASH_ATTN_HOST_DEVICE int number() const { return first + n_block; }
};

/// Of dense sequences.
FLASH_ATTN_HOST_DEVICE TilePlace place_in_group(const KernelParams& params, int index) {
  const Schedule& schedule = params.schedule;
  int first_head = params.group_tiles.divide(index) * schedule.heads_per_group;
  const bool in_last = first_head >= schedule.grouped_heads;
  if (in_last) first_head = schedule.grouped_heads;
  const int in_group = index - first_head * schedule.num_n_blocks;
  const int heads = in_last ? schedule.num_batch_heads - first_head : schedule.heads_per_group;
  const int n_block = in_last ? in_group / heads : params.heads_per_group.divide(in_group);
  const bool falling = schedule.falling && !in_last;
  const int batch_head = first_head + in_group - n_block * heads;
  return {falling ? schedule.num_n_blocks - 1 - n_block : n_block, batch_head, batch_head * schedule.num_n_blocks,
          schedule.num_n_blocks, in_last};
}

/// The same, sequence by sequence.
FLASH_ATTN_HOST_DEVICE TilePlace place_in_sequence(const KernelParams& params, const PackedBlock& block, int index) {
  const Schedule& schedule = params.schedule;
  const int all_heads = params.split.heads.value;
  const bool in_last = block.in_last != 0;
  const int wanted = in_last || schedule.wide_groups ? schedule.tiles_at_once / block.count : schedule.heads_per_group;
  const int heads_per_group = min(max(wanted, 1), all_heads);
  index -= block.first * all_heads;
  const int first_head = index / (heads_per_group * block.count) * heads_per_group;
  index -= first_head * block.count;
  const int heads = min(heads_per_group, all_heads - first_head);
  const int n_block = index / heads, head = first_head + index - n_block * heads;
  return {schedule.falling && !in_last ? block.count - 1 - n_block : n_block, block.sequence * all_heads + head,
          block.first * all_heads + head * block.count, block.count, in_last};
}

/// The place of the tile at this index, less than num_tiles. False: packed sequences have no such tile.
FLASH_ATTN_HOST_DEVICE bool find_place(const KernelParams& params, int index, TilePlace& at) {
  if (params.schedule.packed_blocks == nullptr) {
    at = place_in_group(params, index);
    return true;
  }
  const PackedBlock block = params.schedule.packed_blocks[params.split.heads.divide(index)];
  if (block.sequence < 0) return false;
  at = place_in_sequence(params, block, index);
  return true;
}

/// The place, but for in_last, of the tile with this number; else like find_place().
FLASH_ATTN_HOST_DEVICE bool find_number(const KernelParams& params, int number, TilePlace& at) {
  const Schedule& schedule = params.schedule;
  int all_heads = 0;
  at.first = 0;
  at.count = schedule.num_n_blocks;
  at.in_last = false;
  at.batch_head = 0;
  if (schedule.packed_blocks != nullptr) {
    const PackedBlock block = schedule.packed_blocks[params.split.heads.divide(number)];
    if (block.sequence < 0) return false;
    all_heads = params.split.heads.value;
    at.first = block.first * all_heads;
    at.count = block.count;
    at.batch_head = block.sequence * all_heads;
  }
  const int head = schedule.packed_blocks == nullptr ? params.n_blocks.divide(number) : (number - at.first) / at.count;
  at.batch_head += head;
  at.first += head * at.count;
  at.n_block = number - at.first;
  return true;
}

/// How many tiles there are.
FLASH_ATTN_HOST_DEVICE int count_tiles(const KernelParams& params) {
  const Schedule& schedule = params.schedule;
  if (schedule.packed_blocks == nullptr) return schedule.num_tiles;
  return schedule.packed_blocks[schedule.num_key_blocks].first * static_cast<int>(params.split.heads.value);
}

}  // namespace flash_attn::cuda::sm90::backward
