// Query rows, for the kernels before and after those on tiles.
#pragma once

#include "../../softmax.h"
#include "../schedule/place.h"

namespace flash_attn::cuda::sm80 {

/// A thread block's share of a block of query rows of one head: share_rows of them, a multiple of 16.
struct RowShare {
  SequenceInfo sequence;
  int batch, head;
  int64_t block;                                                 // the block's number in dq_accum and the statistics
  int64_t block_row;                                             // its first row, in the sequence
  int first;                                                     // of its rows, the first of this share
  SM80_DEVICE int64_t row() const { return block_row + first; }  // the same, in the sequence
};

inline int64_t num_row_shares(const BackwardKernelParams& params) {
  const ForwardParams& p = params.problem.forward;
  const int64_t blocks = int64_t{params.num_m_blocks} * p.num_heads * (p.is_varlen_q() ? 1 : p.batch);
  return blocks * (params.block_m / params.share_rows);
}

/// Neighbours are of neighbouring heads, whose rows lie side by side in the usual layout. False: the block that it
/// would be of has no rows.
SM80_DEVICE bool find_row_share(const BackwardKernelParams& params, int64_t index, RowShare& at) {
  const ForwardParams& p = params.problem.forward;
  const uint32_t heads = uint32_t(p.num_heads), shares = uint32_t(params.block_m / params.share_rows);
  const uint32_t number = uint32_t(index) / heads, others = number / shares;
  at.head = int(uint32_t(index) - number * heads);
  at.first = int(number - others * shares) * params.share_rows;
  BlockPlace place{int(others / uint32_t(params.num_m_blocks)), int(others % uint32_t(params.num_m_blocks))};
  if (p.cu_seqlens_q != nullptr) {
    place = find_packed_block(p.cu_seqlens_q, p.total_q, int(p.batch), params.block_m, int(others));
  }
  if (place.block < 0) return false;
  at.batch = place.batch;
  at.sequence = sequence_info(p, at.batch);
  at.block_row = int64_t{place.block} * params.block_m;
  at.block = first_m_block(params, at.sequence, at.batch, at.head) + place.block;
  return at.block_row < at.sequence.seqlen_q_padded;
}

}  // namespace flash_attn::cuda::sm80
