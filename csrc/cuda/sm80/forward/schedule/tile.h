// Which rows a block owns, and which blocks of keys they see.
#pragma once

#include "../../../../philox.h"
#include "../../../common/tiles/order.h"
#include "../../packed_block.h"
#include "../params.h"

namespace flash_attn::cuda::sm80 {

/// Everything in rows and columns of the tile's own sequence.
struct ForwardTile {
  SequenceInfo sequence;
  int batch, head, kv_head;
  int m_begin;
  int col_begin, col_end;    // keys that some row sees
  int full_begin, full_end;  // keys that all rows see
  int block_begin, block_end;
  int whole_begin, whole_count;  // tiles of keys that exist in full
  const char *k, *v;             // the sequence's first key of kv_head
  const char* mask;              // of Rules::kBias: the tile's first row of attn_mask
  int part_row;                  // first row of the tile's partial results; -1: not split
  Dropout dropout;               // in kernels of Rules::kDropout

  /// To the first row of this tile's batch entry; packed sequences are found by their rows alone.
  SM80_DEVICE int64_t batch_offset(const TensorView& view, bool packed) const {
    return packed ? 0 : batch * view.batch;
  }
};

/// False: there is nothing to do. The order of tiles: common/tiles/order.h.
template <int kBlockM, int kBlockN>
SM80_DEVICE bool find_tile(const ForwardKernelParams& params, ForwardTile& tile) {
  const ForwardParams& p = params.problem;
  const TileSchedule& schedule = params.schedule;
  int index = int(params.first_block + blockIdx.x), part = 0, m_block;
  tile.part_row = -1;
  if (index >= schedule.split_begin) {
    const int split_tile = (index - schedule.split_begin) / schedule.num_splits;
    part = index - schedule.split_begin - split_tile * schedule.num_splits;
    index = schedule.split_begin + split_tile;
    tile.part_row = (split_tile * schedule.num_splits + part) * kBlockM;
  }
  if (p.cu_seqlens_q != nullptr) {
    int number;
    tile.head = schedule.num_m_blocks.divide(index, number);
    if (params.falls) number = int(schedule.num_m_blocks.value) - 1 - number;
    const BlockPlace at = find_packed_block(p.cu_seqlens_q, p.total_q, int(p.batch), kBlockM, number);
    if (at.block < 0) return false;
    tile.batch = at.batch, m_block = at.block;
  } else {
    const TilePlace at = tile_place(schedule, p, index);
    tile.batch = at.batch, tile.head = at.head, m_block = at.m_block;
  }
  tile.kv_head = schedule.queries_per_head.divide(tile.head);
  tile.m_begin = m_block * kBlockM;
  tile.sequence = schedule.alike ? schedule.sequence : sequence_info(p, tile.batch);
  const SequenceInfo& s = tile.sequence;
  const auto first_key = [&](const TensorView& view) {
    return static_cast<const char*>(view.data) + 2 * (tile.batch_offset(view, p.cu_seqlens_k != nullptr) +
                                                      int64_t{tile.kv_head} * view.head + s.k_row * view.row);
  };
  tile.k = first_key(p.k), tile.v = first_key(p.v);
  if (tile.m_begin >= s.seqlen_q) return false;  // rows without a query are filled by another kernel
  const int64_t row_end = clamp<int64_t>(tile.m_begin + kBlockM, 0, s.seqlen_q);
  const Range some = visible_columns(p, s, tile.m_begin, row_end);
  tile.col_begin = int(clamp<int64_t>(some.begin, 0, s.seqlen_k));
  tile.col_end = int(clamp<int64_t>(some.end, tile.col_begin, s.seqlen_k));
  tile.full_begin = int(clamp<int64_t>(visible_columns(p, s, row_end - 1).begin, 0, s.seqlen_k));
  tile.full_end = int(clamp<int64_t>(visible_columns(p, s, tile.m_begin).end, 0, s.seqlen_k));
  tile.block_begin = tile.col_begin / kBlockN;
  tile.block_end = (tile.col_end + kBlockN - 1) / kBlockN;
  if (tile.part_row >= 0) {
    const int blocks = tile.block_end - tile.block_begin;
    tile.block_end = tile.block_begin + blocks * (part + 1) / schedule.num_splits;
    tile.block_begin += blocks * part / schedule.num_splits;
  }
  tile.whole_begin = (tile.col_begin + kBlockN - 1) / kBlockN;
  tile.whole_count = max(0, tile.col_end / kBlockN - tile.whole_begin);
  return true;
}

}  // namespace flash_attn::cuda::sm80
