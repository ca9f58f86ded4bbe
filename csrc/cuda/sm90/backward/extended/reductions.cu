#include "../../../common/launch.h"
#include "../params.h"
#include "reductions.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

constexpr int kThreads = 256;

/// Sum over the threads of the CTA, in thread 0; in a fixed order.
__device__ double block_sum(double x) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = x;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();  // the sums so far are there
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

struct SlopesArguments {
  BackwardParams problem;
  SlopeSums sums;
};

/// A CTA makes one number of dslopes.
__global__ void __launch_bounds__(kThreads) reduce_slopes_kernel(const __grid_constant__ SlopesArguments arguments) {
  const ForwardParams& p = arguments.problem.forward;
  const int64_t heads = p.num_heads, head = blockIdx.x % heads;
  const bool one = arguments.problem.slopes_have_batch;
  const int64_t begin = one ? blockIdx.x / heads : 0, end = one ? begin + 1 : p.batch;
  double sum = 0;
  for (int64_t b = begin; b < end; ++b) {
    const float* const sums = arguments.sums.sums + (b * heads + head) * arguments.sums.blocks;
    for (int64_t i = threadIdx.x; i < arguments.sums.blocks; i += kThreads) sum -= static_cast<double>(sums[i]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) static_cast<float*>(arguments.problem.dslopes)[blockIdx.x] = static_cast<float>(sum);
}

/// A CTA sums up over a head's rows of all sequences.
__global__ void __launch_bounds__(kThreads) reduce_sinks_kernel(const __grid_constant__ RowsParams rows) {
  constexpr float kLog2E = 1.4426950408889634f;
  const ForwardParams& p = rows.problem.forward;
  const int64_t head = blockIdx.x;
  const float sink = static_cast<const float*>(p.sinks)[head] * kLog2E;
  double sum = 0;
  for (int64_t b = 0; b < p.batch && sink != -INFINITY; ++b) {
    const SequenceInfo info = sequence_info(p, b);
    const int64_t first = head * rows.num_blocks + first_block(p, info, b, rows.block_m, rows.num_m_blocks);
    for (int64_t row = threadIdx.x; row < info.seqlen_q; row += kThreads) {
      const float* const of_block =
          reinterpret_cast<const float*>(rows.statistics) + (first + row / rows.block_m) * 4 * rows.block_m;
      const int64_t in_block = row % rows.block_m;
      sum += static_cast<double>(exp2f(sink + of_block[in_block]) * of_block[rows.block_m + in_block]);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) static_cast<float*>(rows.problem.dsinks)[head] = static_cast<float>(sum);
}

}  // namespace

void reduce_slopes(const BackwardParams& problem, const SlopeSums& sums, cudaStream_t stream) {
  const ForwardParams& p = problem.forward;
  const int64_t numbers = p.num_heads * (problem.slopes_have_batch ? p.batch : 1);
  reduce_slopes_kernel<<<static_cast<unsigned>(numbers), kThreads, 0, stream>>>({problem, sums});
  check(cudaGetLastError(), "sm90 dslopes");
}

void reduce_sinks(const RowsParams& rows, cudaStream_t stream) {
  reduce_sinks_kernel<<<static_cast<unsigned>(rows.problem.forward.num_heads), kThreads, 0, stream>>>(rows);
  check(cudaGetLastError(), "sm90 dsinks");
}

}  // namespace flash_attn::cuda::sm90::backward
