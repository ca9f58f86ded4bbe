// Which tiles exist and in which order they are worked on. A tile is kBlockM query rows of one head, with the columns
// they see; the scheduler turns an index into a Tile, and the others work on the Tile alone.
#pragma once

#include "../../sequence.h"
#include "ptx.h"
#include "tile_schedule.h"

namespace flash_attn::sm90 {

struct Tile {
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
  SM90_DEVICE bool has_columns() const { return num_cols > 0; }
};

/// Half of the 32-bit range, so that adding a row does not overflow.
constexpr int kUnbounded = 1 << 30;

SM90_DEVICE int clamp_to_int(int64_t x) { return static_cast<int>(clamp<int64_t>(x, -kUnbounded, kUnbounded)); }

SM90_DEVICE int num_work_items(const TileSchedule& s, const ForwardParams& p) {
  if (s.order == TileSchedule::kPacked) return s.first_m_block[p.batch] * static_cast<int>(s.num_heads.value);
  return s.num_tiles + (s.num_tiles - s.split_begin) * (s.num_splits - 1);
}

/// The counter of a launch whose CTAs share out tiles among themselves. The workspace is undefined when the kernel
/// starts, and a launch of its own to clear it costs 2 us: so CTA 0 opens the counter, and the others wait until it
/// carries this launch's id. The last ticket closes it, so that a graph can be replayed with the same id.
SM90_DEVICE void open_counter(const TileSchedule& s, uint64_t launch_id) {
  s.next_tile->value = 0;
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(&s.next_tile->launch_id), "l"(launch_id) : "memory");
}

SM90_DEVICE void await_counter(const TileSchedule& s, uint64_t launch_id) {
  uint64_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(&s.next_tile->launch_id) : "memory");
  } while (found != launch_id);
}

SM90_DEVICE int take_tile(const TileSchedule& s) { return gridDim.x + atomicAdd(&s.next_tile->value, 1); }

/// After take_tile() said `index`. Every CTA takes tickets until one is beyond the last tile.
SM90_DEVICE void close_counter(const TileSchedule& s, int index, int num_items) {
  if (index == num_items + static_cast<int>(gridDim.x) - 1) s.next_tile->launch_id = 0;
}

struct TilePlace {
  int m_block, head, batch;
};

/// Longest first: within a group of heads the last rows of all heads, then the rows before them, and so on. The
/// shortest quarter of all heads' tiles comes at the very end, where short tiles even out when the CTAs finish.
SM90_DEVICE TilePlace place_longest_first(const TileSchedule& s, int index) {
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

SM90_DEVICE TilePlace place_packed(const TileSchedule& s, int batch, int index) {
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

SM90_DEVICE TilePlace tile_place(const TileSchedule& s, const ForwardParams& p, int index) {
  if (s.order == TileSchedule::kLongestFirst) return place_longest_first(s, index);
  if (s.order == TileSchedule::kPacked) return place_packed(s, static_cast<int>(p.batch), index);
  TilePlace place;
  const int batch_head = s.num_m_blocks.divide(index, place.m_block);
  place.batch = s.num_heads.divide(batch_head, place.head);
  return place;
}

/// Writes field by field to shared memory: the scheduler has few registers.
template <int kBlockM, int kBlockN>
SM90_DEVICE void make_tile(const TileSchedule& s, const ForwardParams& p, int index, Tile& tile) {
  int split_tile = -1, part = 0;
  if (index >= s.split_begin) {
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
    const Range cols = visible_columns(p, info, m_begin, min(m_begin + kBlockM, seqlen_q));
    col_begin = static_cast<int>(clamp<int64_t>(cols.begin, 0, info.seqlen_k));
    col_end = static_cast<int>(clamp<int64_t>(cols.end, col_begin, info.seqlen_k));
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
  const int64_t shift = info.diagonal - col_begin;
  tile.right_bound = p.window_right >= 0 ? clamp_to_int(shift + p.window_right) : kUnbounded;
  tile.left_bound = p.window_left >= 0 ? clamp_to_int(shift - p.window_left) : -kUnbounded;
}

}  // namespace flash_attn::sm90
