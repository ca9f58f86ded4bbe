// A tile under attn_mask and the rules of scores: which of its blocks are visited, and by whom.
#pragma once

#include "../tile.h"

namespace flash_attn::cuda::sm90::forward {

/// A visited block: its number, and bits.
struct VisitedBlock {
  static constexpr int kRowsShift = 24;  // + consumer: one of its rows sees one of the columns
  static constexpr uint32_t kAllRows = 15u << kRowsShift;
  static constexpr uint32_t kUnclean = 1u << 28;  // no row of the tile sees some column: its V may be NaN
  uint32_t word;                                  // 0: none
  FLASH_ATTN_DEVICE int n_block() const { return static_cast<int>(word & ((1u << kRowsShift) - 1)); }
  FLASH_ATTN_DEVICE bool is_seen_by(int consumer) const { return (word >> (kRowsShift + consumer) & 1) != 0; }
  FLASH_ATTN_DEVICE bool is_unclean() const { return (word & kUnclean) != 0; }
};

struct ExtendedTile : Tile {
  static constexpr bool kExtended = true;
  int col_begin;    // of the sequence: the tile's column 0
  int first_col;    // columns before it, in the first block, nobody sees
  int diagonal;     // of the sequence
  int part;         // of a split tile, which one
  float slope;      // of ALiBi
  int num_visited;  // blocks
  bool listed;      // they stand in the tile's list; else they are all
  uint32_t flags;   // of each, where all blocks are visited

  /// A block where all are visited.
  FLASH_ATTN_DEVICE VisitedBlock whole_block(int n_block) const {
    return {static_cast<uint32_t>(n_block) | flags | (n_block == 0 && first_col > 0 ? VisitedBlock::kUnclean : 0)};
  }
};

}  // namespace flash_attn::cuda::sm90::forward
