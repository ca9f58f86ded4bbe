#include "../../sequence.h"
#include "launch.h"
#include "prepare.h"
#include "ptx.h"

namespace flash_attn::sm90 {
namespace {

constexpr int kThreads = 256;

/// By one CTA: every thread counts a run of sequences, then the runs are summed up.
__device__ void count_m_blocks(const ForwardParams& params, int block_m, int* first_m_block) {
  __shared__ int before[kThreads];
  const int batch = static_cast<int>(params.batch);
  const int run = (batch + kThreads - 1) / kThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * run, batch), end = min(begin + run, batch);
  const auto m_blocks = [&](int b) {
    return static_cast<int>((sequence_info(params, b).seqlen_q_padded + block_m - 1) / block_m);
  };
  int count = 0;
  for (int b = begin; b < end; ++b) count += m_blocks(b);
  before[threadIdx.x] = count;
  __syncthreads();
  for (int distance = 1; distance < kThreads; distance *= 2) {
    const int left = threadIdx.x >= distance ? before[threadIdx.x - distance] : 0;
    __syncthreads();
    before[threadIdx.x] += left;
    __syncthreads();
  }
  int sum = before[threadIdx.x] - count;
  for (int b = begin; b < end; ++b) {
    first_m_block[b] = sum;
    sum += m_blocks(b);
  }
  if (threadIdx.x == kThreads - 1) first_m_block[batch] = sum;
}

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
  if (blockIdx.x == 0) count_m_blocks(params, block_m, first_m_block);
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
  check(cudaGetLastError(), "prepare");
}

}  // namespace flash_attn::sm90
