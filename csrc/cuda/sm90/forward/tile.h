// A tile is kBlockM query rows of one head, with the columns they see. The scheduler turns an index in the order of
// tiles (common/tiles/order.h) into a Tile, and the others work on the Tile alone.
#pragma once

#include "../../../mask_kind.h"
#include "../../common/tiles/order.h"
#include "../../common/tiles/visibility.h"
#include "../hopper/cluster.h"

namespace flash_attn::cuda::sm90::forward {

struct Tile {
  static constexpr bool kExtended = false;
  int num_blocks;          // of kBlockN columns, at least 1; 0: no more tiles
  int num_cols;            // columns; what lies beyond in the last block is zero and masked
  int m_begin;             // first row, in the sequence
  int num_rows;            // rows to write: seqlen_q_padded
  int seqlen_q;            // rows from here on are written as 0
  int head, batch, q_row;  // for lse
  // TMA coordinates (tensor_map.h) of the first row of q and out and of the first column's row of k and v.
  int q_x, q_y, out_x, out_y, q_batch;
  int kv_x, kv_y, kv_head, kv_batch;
  int right_bound, left_bound;  // row r sees columns [r + left_bound, r + right_bound] of the tile's
  int partial_row;              // first row of the tile's partial results; -1: not split

  /// Without columns nothing is loaded: what the buffers hold is masked, and rows that see nothing are written as 0. A
  /// box wholly outside its tensor would be no way out: TMA touches the map's base address then, which is moved.
  FLASH_ATTN_DEVICE bool has_columns() const { return num_cols > 0; }
  /// Of the tile's columns.
  FLASH_ATTN_DEVICE Band band() const { return {right_bound, left_bound, num_cols, seqlen_q}; }
};

/// Writes field by field to shared memory: the scheduler has few registers. AnyTile is Tile or ExtendedTile. With
/// `found` rows see the band that was found in attn_mask, not what the problem says. With kCluster the tile is that of
/// this CTA's cluster, and the part its rank's.
template <int kBlockM, int kBlockN, bool kCluster = false, typename AnyTile>
FLASH_ATTN_DEVICE void make_tile(const TileSchedule& s, const ForwardParams& p, int index, AnyTile& tile,
                                 const mask::MaskKind* found = nullptr) {
  int split_tile = -1, part = 0;
  if constexpr (kCluster) {
    index = split_tile = cluster_id();
    part = cluster_rank();
  } else if (index >= s.split_begin) {
    split_tile = (index - s.split_begin) / s.num_splits;
    part = index - s.split_begin - split_tile * s.num_splits;
    index = s.split_begin + split_tile;
  }
  tile.partial_row = split_tile < 0 ? -1 : (split_tile * s.num_splits + part) * kBlockM;

  const TilePlace at = tile_place(s, p, index);
  tile.head = at.head;
  tile.batch = at.batch;
  tile.q_batch = p.cu_seqlens_q != nullptr ? 0 : at.batch;
  tile.kv_batch = p.cu_seqlens_k != nullptr ? 0 : at.batch;
  tile.kv_head = s.queries_per_head.divide(at.head);

  const SequenceInfo info = s.alike ? s.sequence : sequence_info(p, at.batch);
  const int m_begin = at.m_block * kBlockM;
  const int seqlen_q = static_cast<int>(info.seqlen_q), num_rows = static_cast<int>(info.seqlen_q_padded);
  const int q_row = static_cast<int>(info.q_row);
  tile.m_begin = m_begin;
  tile.num_rows = num_rows;
  tile.seqlen_q = seqlen_q;
  tile.q_row = q_row;
  tile.q_x = static_cast<int>(p.seqlen_q) - seqlen_q + m_begin;
  tile.q_y = q_row + seqlen_q;
  tile.out_x = static_cast<int>(p.seqlen_q) - num_rows + m_begin;
  tile.out_y = q_row + num_rows;

  int col_begin = 0, col_end = 0;
  if (m_begin < seqlen_q) {
    const int rows_end = min(m_begin + kBlockM, seqlen_q);
    Range cols;
    if (found != nullptr) {
      cols = {int64_t{m_begin} + found->left, int64_t{rows_end} + found->right};
    } else {
      cols = visible_columns(p, info, m_begin, rows_end);
    }
    col_begin = static_cast<int>(clamp<int64_t>(cols.begin, 0, info.seqlen_k));
    col_end = static_cast<int>(clamp<int64_t>(cols.end, col_begin, info.seqlen_k));
  }
  [[maybe_unused]] const int first_col = col_begin;
  if constexpr (AnyTile::kExtended) {
    // Blocks of a tile are whole cells of the packed mask, and whole blocks of dropout's numbers.
    if ((p.mask.data != nullptr || p.dropout_p > 0) && col_begin < col_end) col_begin -= col_begin % kBlockN;
  }
  if (split_tile >= 0) {
    const int blocks = (col_end - col_begin + kBlockN - 1) / kBlockN;
    const int first = blocks * part / s.num_splits, last = blocks * (part + 1) / s.num_splits;
    col_end = min(col_end, col_begin + last * kBlockN);
    col_begin += first * kBlockN;
  }
  const int num_cols = col_end - col_begin;
  tile.num_cols = num_cols;
  tile.num_blocks = max(1, (num_cols + kBlockN - 1) / kBlockN);
  tile.kv_x = static_cast<int>(p.seqlen_k) - num_cols;
  tile.kv_y = static_cast<int>(info.k_row) + col_end;
  if (found != nullptr) {
    tile.right_bound = found->right - col_begin;
    tile.left_bound = found->left - col_begin;
  } else {
    const int64_t shift = info.diagonal - col_begin;
    tile.right_bound = right_bound(p.window_right, shift);
    tile.left_bound = left_bound(p.window_left, shift);
  }
  if constexpr (AnyTile::kExtended) {
    tile.col_begin = col_begin;
    tile.first_col = first_col - col_begin;
    tile.diagonal = static_cast<int>(info.diagonal);
    tile.part = part;
  }
}

}  // namespace flash_attn::cuda::sm90::forward
