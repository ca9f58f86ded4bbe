// Where blocks of rows lie in packed sequences and in the workspace, see params.h.
#pragma once

#include "../mma.h"
#include "params.h"

namespace flash_attn::cuda::sm80 {

/// A block of packed or of dense sequences.
struct BlockPlace {
  int batch, block;  // block: in its sequence
};

/// Of the block with this number among packed sequences; before the first one's, a negative block. All lanes of a warp
/// search together.
SM80_DEVICE BlockPlace find_packed_block(const int32_t* cu_seqlens, int64_t total, int batch, int block_rows,
                                         int number) {
  const int lane = int(threadIdx.x) % 32;
  const auto first_block = [&](int b) { return int(clamp<int64_t>(cu_seqlens[b], 0, total)) / block_rows + b; };
  int low = 0, count = batch;  // the last sequence whose first block is not after `number`
  while (count > 1) {
    const int step = (count + 31) / 32;
    const bool before = lane * step < count && first_block(low + lane * step) <= number;
    const int at = 31 - __clz(int(__ballot_sync(~0u, before) | 1u));
    low += at * step;
    count = min(step, count - at * step);
  }
  return {low, number - first_block(low)};
}

/// Number of a query head's first block of a sequence, in dq_accum and the statistics.
SM80_DEVICE int64_t first_m_block(const BackwardKernelParams& params, const SequenceInfo& sequence, int batch,
                                  int head) {
  const ForwardParams& p = params.problem.forward;
  if (p.cu_seqlens_q != nullptr) {
    return int64_t{head} * params.num_m_blocks + sequence.q_row / params.block_m + batch;
  }
  return (int64_t{batch} * p.num_heads + head) * params.num_m_blocks;
}

/// The same of blocks of keys, for what there is of each query head.
SM80_DEVICE int64_t first_n_block(const BackwardKernelParams& params, const SequenceInfo& sequence, int batch,
                                  int head) {
  const ForwardParams& p = params.problem.forward;
  if (p.cu_seqlens_k != nullptr) {
    return int64_t{head} * params.num_n_blocks + sequence.k_row / params.block_n + batch;
  }
  return (int64_t{batch} * p.num_heads + head) * params.num_n_blocks;
}

/// Of number i of lane's four of a fragment (16 x 8): what an instruction of a warp adds at once lies together.
SM80_DEVICE int dq_place(int lane, int i) {
#if __CUDA_ARCH__ >= 900
  return 4 * lane + i;
#else
  return 32 * i + lane;
#endif
}

/// Eight elements to global memory; past the end of a row there are fewer.
template <bool kMayBeUnaligned, typename Element>
SM80_DEVICE void store_piece(Element* to, const uint4& x, int columns, bool aligned) {
  if (!kMayBeUnaligned || aligned) {
    *reinterpret_cast<uint4*>(to) = x;
    return;
  }
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    if (c < columns) reinterpret_cast<uint16_t*>(to)[c] = uint16_t(words[c / 2] >> (16 * (c % 2)));
  }
}

SM80_DEVICE int64_t row_offset(const TensorView& view, bool packed, int batch, int64_t row, int head) {
  return (packed ? 0 : batch * view.batch) + row * view.row + head * view.head;
}

}  // namespace flash_attn::cuda::sm80
