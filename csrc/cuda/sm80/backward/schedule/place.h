// Where blocks of rows lie in packed sequences and in the workspace, see params.h.
#pragma once

#include "../../packed_block.h"
#include "../params.h"

namespace flash_attn::cuda::sm80 {

/// Number of a query head's first block of a sequence, in dq_accum and the statistics.
SM80_DEVICE int64_t first_m_block(const BackwardKernelParams& params, const SequenceInfo& sequence, int batch,
                                  int head) {
  const ForwardParams& p = params.problem.forward;
  if (p.cu_seqlens_q != nullptr) {
    return int64_t{head} * params.num_m_blocks + first_packed_block(sequence.q_row, batch, params.block_m);
  }
  return (int64_t{batch} * p.num_heads + head) * params.num_m_blocks;
}

/// The same of blocks of keys, for what there is of each query head.
SM80_DEVICE int64_t first_n_block(const BackwardKernelParams& params, const SequenceInfo& sequence, int batch,
                                  int head) {
  const ForwardParams& p = params.problem.forward;
  if (p.cu_seqlens_k != nullptr) {
    return int64_t{head} * params.num_n_blocks + first_packed_block(sequence.k_row, batch, params.block_n);
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

/// A lane's four numbers of a fragment, in that order.
SM80_DEVICE void store_accumulated(float* fragment, int lane, const float (&x)[4], float scale) {
#if __CUDA_ARCH__ >= 900
  *reinterpret_cast<float4*>(fragment + dq_place(lane, 0)) = {x[0] * scale, x[1] * scale, x[2] * scale, x[3] * scale};
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) fragment[dq_place(lane, i)] = x[i] * scale;
#endif
}
SM80_DEVICE float4 load_accumulated(const float* fragment, int lane) {
#if __CUDA_ARCH__ >= 900
  return __ldcs(reinterpret_cast<const float4*>(fragment + dq_place(lane, 0)));
#else
  return {__ldcs(fragment + dq_place(lane, 0)), __ldcs(fragment + dq_place(lane, 1)),
          __ldcs(fragment + dq_place(lane, 2)), __ldcs(fragment + dq_place(lane, 3))};
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
