// Which keys a block owns, and which query rows see them.
#pragma once

#include "../../../philox.h"
#include "../../common/dependent_launch.h"
#include "schedule/place.h"

namespace flash_attn::cuda::sm80 {

/// Rows count from the start of the sequence.
struct BackwardTile {
  SequenceInfo sequence;
  int batch, head_k;
  int n_block, n_begin;
  int keys, stored_keys;      // that take part; that belong to the sequence
  int row_begin, row_end;     // query rows that see some of the keys
  int m_begin, num_m_blocks;  // their blocks
  int m_start;                // the first to be worked on
  int head_begin, head_end;   // query heads that read the keys
  int part;                   // number of what it adds up of dk and dv, see BackwardKernelParams
  int first_m_block;          // of head_begin, in dq_accum and the statistics
  const char *q, *dout;       // the sequence's first row of head 0
  int64_t key_block;          // this one's number for head_begin, see first_n_block()
  float dropout_scale;        // 1 without dropout
  Dropout dropout;
  int low, high;  // row i of the sequence sees key j of the block when low <= j - i <= high
};

/// Blocks that wait for others are numbered as they start.
SM80_DEVICE uint32_t tile_index(const BackwardKernelParams& params) {
  if (params.turns == nullptr) return blockIdx.x;
  __shared__ int drawn;
  if (threadIdx.x == 0) {
    grid_dependency_wait();  // for who clears it
    drawn = atomicAdd(params.next_tile, 1);
  }
  __syncthreads();
  return uint32_t(drawn);
}

SM80_DEVICE void set_bounds(const ForwardParams& p, BackwardTile& tile) {
  constexpr int kFar = 1 << 29;
  const int64_t offset = tile.sequence.diagonal - tile.n_begin;
  tile.low = p.window_left < 0 ? -kFar : int(clamp<int64_t>(offset - p.window_left, -kFar, kFar));
  tile.high = p.window_right < 0 ? kFar : int(clamp<int64_t>(offset + p.window_right, -kFar, kFar));
}

SM80_DEVICE void set_dropout(const ForwardParams& p, BackwardTile& tile) {
  tile.dropout_scale = 1.f;
  if (p.dropout_p > 0.0) {
    tile.dropout = make_dropout(p.rng_state, p.dropout_p);
    tile.dropout_scale = float(tile.dropout.scale);
  }
}

/// Which key head, and which of its blocks of keys, comes at a place in the order.
SM80_DEVICE void place_index(const BackwardKernelParams& params, uint32_t index, uint32_t& head, uint32_t& number) {
  const uint32_t blocks = uint32_t(params.num_n_blocks);
  if (params.spread > 0) {  // the first `spread` blocks of all heads, then the next ones of all heads
    const uint32_t spread = uint32_t(params.spread),
                   heads = uint32_t(params.problem.forward.batch * params.problem.forward.num_heads_k);
    const uint32_t group = min(index / (heads * spread), (blocks - 1) / spread);
    const uint32_t in_group = index - group * heads * spread, size = min(spread, blocks - group * spread);
    head = in_group / size;
    number = group * spread + in_group - head * size;
    return;
  }
  if (params.entries_beside) {
    const uint32_t batch = uint32_t(params.problem.forward.batch), heads = uint32_t(params.problem.forward.num_heads_k);
    const uint32_t of_entry = index / batch, in_entry = of_entry / blocks;  // (heads, blocks); head
    head = (index - of_entry * batch) * heads + in_entry;
    number = of_entry - in_entry * blocks;
    return;
  }
  head = index / blocks;
  number = index - head * blocks;
  if (params.falls) number = blocks - 1 - number;
}

/// Where blocks of keys share out the query blocks that they begin with: this one's.
SM80_DEVICE int first_step(const BackwardKernelParams& params, int n_block) {
  if (params.spread == 0) return 0;
  const int in_group = n_block % params.spread, left = params.num_n_blocks - (n_block - in_group);
  return in_group * params.num_m_blocks / min(params.spread, left);
}

/// False: there is nothing to do.
template <typename Config>
SM80_DEVICE bool find_tile(const BackwardKernelParams& params, BackwardTile& tile) {
  constexpr int kBlockN = Config::kBlockN, kBlockM = Config::kBlockM;
  const ForwardParams& p = params.problem.forward;
  const uint32_t index = tile_index(params), heads = uint32_t(p.num_heads_k), parts = uint32_t(params.parts);
  uint32_t outer, number;
  place_index(params, index / parts, outer, number);
  tile.part = int((outer * uint32_t(params.num_n_blocks) + number) * parts + index % parts);
  BlockPlace place{int(outer / heads), int(number)};
  if (p.cu_seqlens_k != nullptr) {
    place = find_packed_block(p.cu_seqlens_k, p.total_k, int(p.batch), kBlockN, int(number));
  }
  tile.batch = place.batch;
  tile.head_k = int(outer % heads);
  tile.n_block = place.block;
  tile.n_begin = place.block * kBlockN;
  const SequenceInfo& s = tile.sequence = sequence_info(p, tile.batch);
  if (place.block < 0 || tile.n_begin >= s.seqlen_k_padded) return false;
  tile.stored_keys = int(clamp<int64_t>(s.seqlen_k_padded - tile.n_begin, 0, kBlockN));
  tile.keys = int(clamp<int64_t>(s.seqlen_k - tile.n_begin, 0, kBlockN));
  Range rows{0, 0};
  if (tile.keys > 0) rows = visible_rows(p, s, tile.n_begin, tile.n_begin + tile.keys);
  tile.row_begin = int(rows.begin < s.seqlen_q ? rows.begin : s.seqlen_q);
  tile.row_end = int(rows.end > tile.row_begin ? rows.end : tile.row_begin);
  tile.m_begin = tile.row_begin / kBlockM;
  tile.num_m_blocks = tile.row_end > tile.row_begin ? (tile.row_end + kBlockM - 1) / kBlockM - tile.m_begin : 0;
  if (parts > 1) {
    const int part = int(index % parts), count = tile.num_m_blocks, before = count * part / int(parts);
    tile.m_begin += before;
    tile.num_m_blocks = count * (part + 1) / int(parts) - before;
  }
  tile.m_start = tile.m_begin + first_step(params, tile.n_block);
  const int group = int(p.num_heads) / int(p.num_heads_k);
  tile.head_begin = tile.head_k * group;
  tile.head_end = tile.head_begin + group;
  tile.first_m_block = int(first_m_block(params, s, tile.batch, tile.head_begin));
  const bool packed = p.cu_seqlens_q != nullptr;
  tile.q = static_cast<const char*>(p.q.data) + 2 * row_offset(p.q, packed, tile.batch, s.q_row, 0);
  const TensorView& dout = params.problem.dout;
  tile.dout = static_cast<const char*>(dout.data) + 2 * row_offset(dout, packed, tile.batch, s.q_row, 0);
  if constexpr (Config::kExtended) {
    tile.key_block = first_n_block(params, s, tile.batch, tile.head_begin) + tile.n_block;
  }
  if constexpr (Config::kDrops) set_dropout(p, tile);
  set_bounds(p, tile);
  return true;
}

/// Whether attn_mask hides all of a block of keys from a block of query rows.
template <typename Config>
SM80_DEVICE bool is_hidden(const BackwardKernelParams& params, const BackwardTile& tile, int head, int m_block) {
  if (params.packed.seen == nullptr || params.turns != nullptr) return false;  // each block has to take its turn
  return (params.packed.tile_classes<Config::kBlockM, Config::kBlockN>(tile.batch, head, m_block * Config::kBlockM,
                                                                       tile.n_begin) &
          mask::kSeen) == 0;
}

}  // namespace flash_attn::cuda::sm80
