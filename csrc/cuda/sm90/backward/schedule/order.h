// The order in which tiles are worked on (Schedule), and why no tile waits for ever.
//
// CTAs draw tiles in this order (take_tile), or start in it where each has a single one, and keep a tile until it ends.
// So when a tile runs, all before it in the order run or have ended. A tile waits for others of the launch in five
// ways:
//
//   its turn         DqProtocol::kOrdered: for those whose turn at a query block is before its own (tiles_before() of
//                    dq/turns.h). These are its head's tiles on one side, which the order puts before it.
//   dmask's turn     (extended/dmask.h) for those that add to the same block of attn_mask's gradient before it: tiles
//   of
//                    the same columns and of heads before its own, which the order puts before it.
//   the first store  DqProtocol::kFirstStores: for the tile that has claimed the block, wherever in the order that is.
//   A
//                    tile claims blocks in the order of its steps, so when it holds one it has been granted all that it
//                    needs before, and waits for nobody until it has stored.
//   prepared rows    (preprocess/prepared_rows.h) for those that prepare its own: a share is prepared by the tile that
//   is
//                    RowPreparation::ahead before the one whose share it is, which is more than the order strays from
//                    the numbers of tiles.
//   complete dQ      the dq writer (dq/writer.h) for all that add to the share that it writes: that of a tile which is
//                    DqWriting::lag back in the order, so far that these are before its own tile.
//
// The first tile in the order that has not ended therefore waits for nobody but claimants, and these for nobody: it
// ends, and so do all. tests/backward_order.cu holds plans of random problems to the first, the third and the fourth.
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
