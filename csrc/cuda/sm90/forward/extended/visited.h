// Which blocks a tile visits under attn_mask: those with a column that one of its rows sees.
#pragma once

#include "../../../common/scores/bias_value.h"
#include "config.h"

namespace flash_attn::cuda::sm90::forward {

/// Of the bits of 64 columns from `col` on, those of columns that exist in the tile's window.
FLASH_ATTN_DEVICE uint64_t without_first_columns(const ExtendedTile& tile, int col, uint64_t columns) {
  const int hidden = tile.first_col - col;
  return hidden <= 0 ? columns : hidden >= 64 ? 0 : columns & (~uint64_t{0} << hidden);
}

/// The columns of a cell of a block that a row of the tile sees; `by_consumer`: which of its consumers do.
template <typename Config>
FLASH_ATTN_DEVICE uint64_t seen_columns(const mask::PackedMask& packed, const ExtendedTile& tile, int col,
                                        uint32_t& by_consumer) {
  const int col_cell = min((tile.col_begin + col) / mask::kCellCols, packed.col_cells - 1);
  const uint64_t* const seen = packed.seen + packed.cell(tile.batch, tile.head, 0, col_cell);
  const int last_row = packed.row_cells - 1;
  int row_cell = tile.m_begin / mask::kCellRows;
  uint64_t all = 0;
#pragma unroll 1
  for (int i = 0; i < Config::kConsumers; ++i) {
    uint64_t word = 0;
#pragma unroll
    for (int j = 0; j < 64 / mask::kCellRows; ++j) {
      word |= __ldg(seen + min(row_cell++, last_row) * (packed.row_step * packed.col_cells));
    }
    if (word != 0) by_consumer |= 1u << i;
    all |= word;
  }
  return without_first_columns(tile, col, all);
}

/// Whether one of the tile's columns is a bad row of V, or nobody has looked. By all lanes of a warp.
FLASH_ATTN_DEVICE bool may_have_bad_rows(const mask::BadRows& bad_rows, const ExtendedTile& tile) {
  if (bad_rows.words == nullptr) return true;
  const uint64_t* const words = bad_rows.of_head(tile.kv_batch, tile.kv_head);
  const int end = (tile.col_begin + tile.num_cols + 63) / 64;
  bool bad = false;
#pragma unroll 1
  for (int i = tile.col_begin / 64 + lane_id(); i < end; i += 32) bad |= __ldg(words + i) != 0;
  return __any_sync(~0u, bad);
}

/// Whether none of the tile's rows sees this column. By all lanes of a warp, which read attn_mask once more.
template <typename Config>
FLASH_ATTN_DEVICE bool is_unseen(const ExtendedParams& params, const ExtendedTile& tile, int col) {
  if (col >= tile.num_cols || col < tile.first_col) return true;
  const MaskView& mask = params.problem.mask;
  if (mask.data == nullptr) return false;
  const int mask_col = tile.col_begin + col, rows_end = min(tile.m_begin + Config::kBlockM, tile.seqlen_q);
  bool sees = false;
#pragma unroll 1
  for (int row = tile.m_begin + lane_id(); row < rows_end; row += 32) {
    if (col < row + tile.left_bound || col > row + tile.right_bound) continue;
    if constexpr (Config::kBias == Bias::kNone) {
      sees = sees || params.packed.sees(tile.batch, tile.head, row, mask_col);
    } else {
      const int64_t place = tile.batch * mask.batch + tile.head * mask.head + row * mask.row + mask_col * mask.col;
      sees = sees || bias_value(mask, place) != -INFINITY;
    }
  }
  return !__any_sync(~0u, sees);
}

/// Whether causal order or a window hides some of a block's columns from some of the tile's rows: then the columns that
/// attn_mask shows to a row are not those that a row sees.
template <typename Config>
FLASH_ATTN_DEVICE bool is_bounded(const ExtendedTile& tile, int n_block) {
  const Band band = tile.band();
  const int col = n_block * Config::kBlockN, last_row = tile.m_begin + Config::kBlockM - 1;
  return col + Config::kBlockN - 1 > tile.m_begin + band.right || col < last_row + band.left;
}

/// Fills a tile's list, by all lanes of a warp. Counts from right to left, as the blocks are visited.
template <typename Config>
FLASH_ATTN_DEVICE void list_visited_blocks(const ExtendedParams& params, ExtendedTile& tile, VisitedBlock* list) {
  const mask::PackedMask& packed = params.packed;
  const int num_blocks = tile.num_cols > 0 ? tile.num_blocks : 0;
  int count = num_blocks;
  uint32_t flags = VisitedBlock::kAllRows;
  if (packed.seen != nullptr) {
    count = 0;
#pragma unroll 1
    for (int last = num_blocks - 1; last >= 0; last -= 32) {
      const int lane = lane_id(), n_block = last - lane;
      uint32_t rows = 0;
      bool clean = true;
      if (n_block >= 0) {
#pragma unroll 1
        for (int col = n_block * Config::kBlockN; col < min((n_block + 1) * Config::kBlockN, tile.num_cols);
             col += 64) {
          const uint64_t seen = seen_columns<Config>(packed, tile, col, rows);
          const int cols = tile.num_cols - col;
          const uint64_t exist = cols >= 64 ? ~uint64_t{0} : (uint64_t{1} << cols) - 1;
          clean = clean && (exist & ~seen) == 0;
        }
      }
      const uint32_t visited = __ballot_sync(~0u, rows != 0);
      const int place = count + __popc(visited & ((1u << lane) - 1));
      if (rows != 0 && place < ExtendedStorage<Config>::kListCapacity) {
        list[place] = {static_cast<uint32_t>(n_block) | rows << VisitedBlock::kRowsShift |
                       (clean && !is_bounded<Config>(tile, n_block) ? 0u : VisitedBlock::kUnclean)};
      }
      count += __popc(visited);
    }
    if (count > ExtendedStorage<Config>::kListCapacity) {
      count = num_blocks;
      flags |= VisitedBlock::kUnclean;
    }
  } else if (params.problem.mask.data != nullptr && may_have_bad_rows(params.bad_rows, tile)) {
    flags |= VisitedBlock::kUnclean;
  }
  const bool listed = count <= ExtendedStorage<Config>::kListCapacity;
  if (lane_id() == 0) {
    tile.num_visited = count;
    tile.listed = listed;
    tile.flags = flags;
  }
  if (packed.seen == nullptr && listed) {
    __syncwarp();  // for the flags
#pragma unroll 1
    for (int i = lane_id(); i < count; i += 32) list[i] = tile.whole_block(count - 1 - i);
  }
}

}  // namespace flash_attn::cuda::sm90::forward
