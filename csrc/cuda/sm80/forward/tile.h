// Which rows a block owns, and which blocks of keys they see.
#pragma once

#include "../../../sequence.h"
#include "../mma.h"
#include "params.h"

namespace flash_attn::cuda::sm80 {

/// Everything in rows and columns of the tile's own sequence.
struct ForwardTile {
  SequenceInfo sequence;
  int batch, head, kv_head;
  int m_begin;
  int col_begin, col_end;    // keys that some row sees
  int full_begin, full_end;  // keys that all rows see
  int block_begin, block_end;

  /// To the first row of this tile's batch entry; packed sequences are found by their rows alone.
  SM80_DEVICE int64_t batch_offset(const TensorView& view, bool packed) const {
    return packed ? 0 : batch * view.batch;
  }
};

/// Number n among the tiles of packed sequences: the sequence and its m block. All lanes of a warp search together.
SM80_DEVICE bool find_packed_tile(const ForwardParams& p, int block_m, int n, int& batch, int& m_block) {
  const int lane = int(threadIdx.x) % 32;
  for (int first = 0; first < int(p.batch); first += 32) {
    const int b = first + lane;
    int blocks = 0;
    if (b < int(p.batch)) blocks = int((sequence_info(p, b).seqlen_q_padded + block_m - 1) / block_m);
    int end = blocks;  // inclusive sum over the lanes
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(~0u, end, step);
      if (lane >= step) end += before;
    }
    const int total = __shfl_sync(~0u, end, 31);
    if (n < total) {
      const int at = __ffs(int(__ballot_sync(~0u, n < end))) - 1;
      batch = first + at;
      m_block = n - __shfl_sync(~0u, end - blocks, at);
      return true;
    }
    n -= total;
  }
  return false;
}

/// False: there is nothing to do. Blocks of one group of heads follow each other, so that its keys stay in L2; in a
/// causal problem the longest come first (longest processing time first, Graham 1969).
template <int kBlockM, int kBlockN>
SM80_DEVICE bool find_tile(const ForwardKernelParams& params, ForwardTile& tile) {
  const ForwardParams& p = params.problem;
  const int64_t index = params.first_block + blockIdx.x;
  int m_block;
  if (p.cu_seqlens_q != nullptr) {
    tile.head = int(index / params.num_m_blocks);
    if (!find_packed_tile(p, kBlockM, int(index % params.num_m_blocks), tile.batch, m_block)) return false;
  } else {
    const int64_t group_tiles = int64_t{params.heads_per_group} * params.num_m_blocks;
    const int64_t group = index / group_tiles;
    const int in_group = int(index % group_tiles);
    const int64_t first_head = group * params.heads_per_group;
    const int64_t left = p.batch * p.num_heads - first_head;
    const int heads = left < params.heads_per_group ? int(left) : params.heads_per_group;
    const int64_t batch_head = first_head + in_group % heads;
    m_block = in_group / heads;
    if (params.longest_first) m_block = params.num_m_blocks - 1 - m_block;
    tile.batch = int(batch_head / p.num_heads);
    tile.head = int(batch_head % p.num_heads);
  }
  tile.kv_head = tile.head / params.group_size;
  tile.m_begin = m_block * kBlockM;
  tile.sequence = sequence_info(p, tile.batch);
  const SequenceInfo& s = tile.sequence;
  if (tile.m_begin >= s.seqlen_q) return false;  // rows without a query are filled by another kernel
  const int64_t row_end = clamp<int64_t>(tile.m_begin + kBlockM, 0, s.seqlen_q);
  const Range some = visible_columns(p, s, tile.m_begin, row_end);
  tile.col_begin = int(clamp<int64_t>(some.begin, 0, s.seqlen_k));
  tile.col_end = int(clamp<int64_t>(some.end, tile.col_begin, s.seqlen_k));
  tile.full_begin = int(clamp<int64_t>(visible_columns(p, s, row_end - 1).begin, 0, s.seqlen_k));
  tile.full_end = int(clamp<int64_t>(visible_columns(p, s, tile.m_begin).end, 0, s.seqlen_k));
  tile.block_begin = tile.col_begin / kBlockN;
  tile.block_end = (tile.col_end + kBlockN - 1) / kBlockN;
  return true;
}

}  // namespace flash_attn::cuda::sm80
