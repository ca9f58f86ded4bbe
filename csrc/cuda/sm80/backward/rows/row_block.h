// Blocks of query rows, for the kernels before and after those on tiles.
#pragma once

#include "../../softmax.h"
#include "../schedule/place.h"

namespace flash_attn::cuda::sm80 {

/// A block of query rows of one head.
struct RowBlock {
  SequenceInfo sequence;
  int batch, head;
  int64_t row;    // its first, in the sequence
  int64_t block;  // its number in dq_accum and the statistics
};

inline int64_t num_row_blocks(const BackwardKernelParams& params) {
  const ForwardParams& p = params.problem.forward;
  return int64_t{params.num_m_blocks} * p.num_heads * (p.is_varlen_q() ? 1 : p.batch);
}

/// Neighbours are of neighbouring heads, whose rows lie side by side in the usual layout. False: there is no such
/// block.
SM80_DEVICE bool find_row_block(const BackwardKernelParams& params, int64_t index, RowBlock& at) {
  const ForwardParams& p = params.problem.forward;
  const uint32_t number = uint32_t(index), heads = uint32_t(p.num_heads), others = number / heads;
  at.head = int(number - others * heads);
  BlockPlace place{int(others / uint32_t(params.num_m_blocks)), int(others % uint32_t(params.num_m_blocks))};
  if (p.cu_seqlens_q != nullptr) {
    place = find_packed_block(p.cu_seqlens_q, p.total_q, int(p.batch), params.block_m, int(others));
  }
  if (place.block < 0) return false;
  at.batch = place.batch;
  at.sequence = sequence_info(p, at.batch);
  at.row = int64_t{place.block} * params.block_m;
  at.block = first_m_block(params, at.sequence, at.batch, at.head) + place.block;
  return at.row < at.sequence.seqlen_q_padded;
}

}  // namespace flash_attn::cuda::sm80
