// The order in which a tile visits its query blocks, the same for all warps that work on it: head by head, of a head
// from m_first on and then, at the end of the tile's blocks, from their other end on. A block is visited once for each
// head.
#pragma once

#include "tile.h"

namespace flash_attn::cuda::sm90::backward {

/// One block after the other.
template <typename Config>
struct BlockWalk {
  const Tile& tile;
  int head, m_block;

  FLASH_ATTN_DEVICE explicit BlockWalk(const Tile& tile)
      : tile(tile), head(tile.m_begin < tile.m_end ? 0 : tile.num_heads), m_block(tile.m_first) {}

  FLASH_ATTN_DEVICE bool ended() const { return head == tile.num_heads; }
  FLASH_ATTN_DEVICE bool starts_head() const { return m_block == tile.m_first; }
  FLASH_ATTN_DEVICE void advance() {
    step();
    if (starts_head()) ++head;
  }
  /// To the next block of the same head; after the last to the first again.
  FLASH_ATTN_DEVICE void step() {
    m_block += block_step<Config>(tile);
    if (m_block == tile.m_end) {
      m_block = tile.m_begin;
    } else if (Config::kDescends && m_block < tile.m_begin) {
      m_block = tile.m_end - 1;
    }
  }

  /// Of the block, in dq_accum and statistics.
  FLASH_ATTN_DEVICE int index(const KernelParams& params) const {
    return tile.block + head * params.num_blocks + m_block;
  }
};

/// The same by threads with few registers: visit(walk) at each block.
template <typename Config, typename Visit>
FLASH_ATTN_DEVICE void for_each_block(const Tile& tile, Visit visit) {
  BlockWalk<Config> walk(tile);
  for (walk.head = 0; walk.head < tile.num_heads; ++walk.head) {
    walk.m_block = tile.m_first;
#pragma unroll 1
    for (int left = tile.m_end - tile.m_begin; left > 0; --left) {
      visit(walk);
      walk.step();
    }
  }
}

/// The same as runs of neighbouring blocks, for the loop of products, which has no registers to spare:
/// visit(head, m_block, m_end, m_step) goes from m_block to before m_end. [A step's loads of the tile come behind its
/// stores, and late: so the run's ends are copies.]
template <typename Config, typename Visit>
FLASH_ATTN_DEVICE void for_each_run(const Tile& tile, Visit visit) {
  // A head's blocks from m_first on, then those before it; or all of them, from the last to the first.
  const int parted = tile.m_first > tile.m_begin && block_step<Config>(tile) > 0;
  for (int part = 0; part < tile.num_heads << parted; ++part) {
    const bool starts = (part & parted) == 0;
    const int m_step = block_step<Config>(tile);
    const int m_end = m_step < 0 ? tile.m_begin - 1 : starts ? tile.m_end : tile.m_first;
    visit(part >> parted, starts ? tile.m_first : tile.m_begin, m_end, m_step);
  }
}

}  // namespace flash_attn::cuda::sm90::backward
