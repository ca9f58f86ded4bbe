#include "../../../sequence.h"
#include "../../common/dependent_launch.h"
#include "../../common/launch.h"
#include "../../common/tiles/packed_blocks.h"
#include "prepare.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

constexpr int kThreads = 256;

/// Rows [begin, end) of out (total_q, num_heads, head_dim_v) and lse.
__device__ void clear_rows(const ForwardParams& params, int64_t begin, int64_t end) {
  const int64_t chunks = params.head_dim_v / 8;  // of 16 bytes
  for (int64_t i = threadIdx.x; i < (end - begin) * params.num_heads * chunks; i += kThreads) {
    const int64_t row = begin + i / chunks / params.num_heads, head = i / chunks % params.num_heads;
    uint16_t* const out = static_cast<uint16_t*>(params.out.data) + row * params.out.row + head * params.out.head;
    reinterpret_cast<uint4*>(out)[i % chunks] = {0, 0, 0, 0};
    if (i % chunks == 0) {
      static_cast<float*>(params.lse.data)[head * params.lse.head + row * params.lse.row] = -INFINITY;
    }
  }
}

__global__ void prepare_kernel(const __grid_constant__ ForwardParams params, int block_m, int* first_m_block) {
  grid_launch_dependents();
  if (blockIdx.x == 0) {
    const int all = count_blocks<kThreads>(
        params.batch, block_m, [&](int b) { return sequence_info(params, b).seqlen_q_padded; },
        [&](int b, int first, int, int) { first_m_block[b] = first; });
    if (threadIdx.x == 0) first_m_block[params.batch] = all;
  }
  for (int64_t b = blockIdx.x; b <= params.batch; b += gridDim.x) {  // the gap before sequence b
    int64_t begin = 0, end = params.total_q;
    if (b > 0) {
      const SequenceInfo last = sequence_info(params, b - 1);
      begin = last.q_row + last.seqlen_q_padded;
    }
    if (b < params.batch) end = sequence_info(params, b).q_row;
    clear_rows(params, begin, end);
  }
}

}  // namespace

void launch_prepare(const ForwardParams& params, int block_m, int* first_m_block, cudaStream_t stream) {
  const int blocks = static_cast<int>(params.batch < 127 ? params.batch + 1 : 128);  // one more gap than sequences
  prepare_kernel<<<blocks, kThreads, 0, stream>>>(params, block_m, first_m_block);
  check(cudaGetLastError(), "sm90 prepare");
}

}  // namespace flash_attn::cuda::sm90::forward
