// What the kernels on tiles need to know of query rows, and memory that they add to.
#include "../../../common/dependent_launch.h"
#include "../../../common/launch.h"
#include "row_share.h"
#include "rows.h"

namespace flash_attn::cuda::sm80 {
namespace {

constexpr int kThreads = 256, kSumThreads = 1024;

template <typename Element>
SM80_DEVICE float dot_words(uint32_t x, uint32_t y, float sum) {
  const Element* const a = reinterpret_cast<const Element*>(&x);
  const Element* const b = reinterpret_cast<const Element*>(&y);
  return fmaf(float(a[0]), float(b[0]), fmaf(float(a[1]), float(b[1]), sum));
}

/// Sum of products of eight columns of both rows, of which `columns` exist.
template <typename Element>
SM80_DEVICE float dot8(const Element* x, const Element* y, int columns, bool aligned) {
  float sum = 0.f;
  if (aligned && columns > 0) {
    const uint4 a = *reinterpret_cast<const uint4*>(x), b = *reinterpret_cast<const uint4*>(y);
    sum = dot_words<Element>(a.x, b.x, dot_words<Element>(a.y, b.y, sum));
    sum = dot_words<Element>(a.z, b.z, dot_words<Element>(a.w, b.w, sum));
  } else {
#pragma unroll 1
    for (int c = 0; c < 8 && c < columns; ++c) sum = fmaf(float(x[c]), float(y[c]), sum);
  }
  return sum;
}

struct PrepareParams {
  BackwardKernelParams kernel;
  int warps;
  int64_t first_block;
};

/// A share of a block of query rows; kLanes lanes a row.
template <typename Element, int kLanes>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ PrepareParams arguments) {
  const BackwardKernelParams& params = arguments.kernel;
  const BackwardParams& problem = params.problem;
  const ForwardParams& p = problem.forward;
  grid_launch_dependents();
  if (arguments.first_block + blockIdx.x == 0 && threadIdx.x == 0 && params.next_tile != nullptr) *params.next_tile = 0;
  RowShare at;
  if (!find_row_share(params, arguments.first_block + blockIdx.x, at)) return;
  const SequenceInfo& s = at.sequence;
  if (at.block_row >= s.seqlen_q) return;  // tiles read all rows of the blocks before
  const int64_t first_row = at.row(), first_place = at.block * params.block_m + at.first;
  if (problem.dq.data != nullptr) {
    float4* const accum = reinterpret_cast<float4*>(params.dq_accum + first_place * params.columns);
    for (int i = int(threadIdx.x); i < params.share_rows * params.columns / 4; i += kThreads) accum[i] = float4{};
  }
  if (params.turns != nullptr && at.first == 0 && int(threadIdx.x) < arguments.warps) {
    params.turns[at.block * arguments.warps + threadIdx.x] = 0;
  }
  const bool packed = p.cu_seqlens_q != nullptr;
  const int lane = int(threadIdx.x) % kLanes, columns = int(p.head_dim_v) - 8 * lane;
  constexpr int kTogether = 8 * kLanes;  // columns of a row that its lanes take at a time
  const Element* const out = static_cast<const Element*>(p.out.data) +
                             row_offset(p.out, packed, at.batch, s.q_row + first_row, at.head) + 8 * lane;
  const Element* const dout = static_cast<const Element*>(problem.dout.data) +
                              row_offset(problem.dout, packed, at.batch, s.q_row + first_row, at.head) + 8 * lane;
  const auto statistic = [&](const RowView& view, int row) {
    return static_cast<const float*>(
        view.data)[(packed ? 0 : at.batch * view.batch) + at.head * view.head + (s.q_row + first_row + row) * view.row];
  };
#pragma unroll 4
  for (int row = int(threadIdx.x) / kLanes; row < params.share_rows; row += kThreads / kLanes) {
    const bool exists = first_row + row < s.seqlen_q;
    float sum = 0.f;
    for (int c = 0; exists && c < columns; c += kTogether) {
      sum += dot8(out + row * p.out.row + c, dout + row * problem.dout.row + c, columns - c, params.aligned);
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane != 0) continue;
    const float lse = exists ? statistic(p.lse, row) : -INFINITY;
    if (exists && problem.dlse.data != nullptr) sum -= statistic(problem.dlse, row);
    params.minus_lse[first_place + row] = lse == -INFINITY ? lse : -lse * params.lse_factor;
    params.minus_delta[first_place + row] = lse == -INFINITY ? 0.f : -sum;
  }
}

/// Rows [begin, end) of a packed tensor become 0: this block's part, of those of blockIdx.y.
__device__ void clear_rows(const TensorView& view, int64_t begin, int64_t end, int64_t heads, int64_t columns) {
  if (view.data == nullptr) return;
  for (int64_t i = int64_t{blockIdx.y} * kThreads + threadIdx.x; i < (end - begin) * heads * columns;
       i += int64_t{gridDim.y} * kThreads) {
    const int64_t row = i / columns;
    static_cast<uint16_t*>(view.data)[(begin + row / heads) * view.row + row % heads * view.head + i % columns] = 0;
  }
}

constexpr int kGapBlocks = 128;

/// Blocks share out the gaps, before sequence b and after the last, and what is in one: the last may be nearly all.
__global__ void __launch_bounds__(kThreads) clear_gaps_kernel(const __grid_constant__ BackwardParams params) {
  const ForwardParams& p = params.forward;
  for (int64_t b = blockIdx.x; b <= p.batch; b += gridDim.x) {
    int64_t q_begin = 0, q_end = p.total_q, k_begin = 0, k_end = p.total_k;
    if (b > 0) {
      const SequenceInfo last = sequence_info(p, b - 1);
      q_begin = last.q_row + last.seqlen_q_padded;
      k_begin = last.k_row + last.seqlen_k_padded;
    }
    if (b < p.batch) {
      const SequenceInfo next = sequence_info(p, b);
      q_end = next.q_row;
      k_end = next.k_row;
    }
    if (p.cu_seqlens_q != nullptr) clear_rows(params.dq, q_begin, q_end, p.num_heads, p.head_dim);
    if (p.cu_seqlens_k != nullptr) {
      clear_rows(params.dk, k_begin, k_end, p.num_heads_k, p.head_dim);
      clear_rows(params.dv, k_begin, k_end, p.num_heads_k, p.head_dim_v);
    }
  }
}

template <typename Element>
void launch_prepare(const PrepareParams& arguments, cudaStream_t stream) {
  const int64_t columns = arguments.kernel.problem.forward.head_dim_v;
  auto* const kernel = columns <= 64    ? prepare_kernel<Element, 8>
                       : columns <= 128 ? prepare_kernel<Element, 16>
                                        : prepare_kernel<Element, 32>;
  cuda::launch_blocks(kernel, arguments, num_row_shares(arguments.kernel), kThreads, 0, stream, "sm80 backward rows");
}

/// Sum over the threads of the block, in thread 0.
__device__ double block_sum(double x) {
  __shared__ double sums[kSumThreads];
  sums[threadIdx.x] = x;
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();  // the sums so far are there
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

/// A block sums up over a head's rows of all sequences.
__global__ void __launch_bounds__(kSumThreads)
    reduce_sinks_kernel(const __grid_constant__ BackwardKernelParams params) {
  const ForwardParams& p = params.problem.forward;
  const int head = int(blockIdx.x);
  const float sink = static_cast<const float*>(p.sinks)[head] * kLog2E, to_log2 = kLog2E / params.lse_factor;
  double sum = 0;
  for (int b = 0; b < int(p.batch) && sink != -INFINITY; ++b) {
    const SequenceInfo s = sequence_info(p, b);
    const int64_t first = first_m_block(params, s, b, head) * params.block_m;
    for (int64_t row = threadIdx.x; row < s.seqlen_q; row += kSumThreads) {
      sum += double(exp2f(sink + params.minus_lse[first + row] * to_log2) * params.minus_delta[first + row]);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) static_cast<float*>(params.problem.dsinks)[head] = float(sum);
}

/// A block makes one number of dslopes: - sum of dS times distance over a head, of one sequence or of all.
__global__ void __launch_bounds__(kSumThreads)
    reduce_slopes_kernel(const __grid_constant__ BackwardKernelParams params, int warps) {
  const ForwardParams& p = params.problem.forward;
  const int heads = int(p.num_heads), head = int(blockIdx.x) % heads;
  const bool one = params.problem.slopes_have_batch;
  const int begin = one ? int(blockIdx.x) / heads : 0, end = one ? begin + 1 : int(p.batch);
  double sum = 0;
  for (int b = begin; b < end; ++b) {
    const SequenceInfo s = sequence_info(p, b);
    const float* const sums = params.slope_sums + first_n_block(params, s, b, head) * warps;
    const int64_t count = (s.seqlen_k_padded + params.block_n - 1) / params.block_n * warps;
    for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum -= double(sums[i]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) static_cast<float*>(params.problem.dslopes)[blockIdx.x] = float(sum);
}

}  // namespace

void prepare_rows(const BackwardKernelParams& params, int warps, cudaStream_t stream) {
  const ForwardParams& p = params.problem.forward;
  if (p.is_varlen_q() || p.is_varlen_k()) {
    const unsigned gaps = unsigned(std::min<int64_t>(p.batch + 1, kGapBlocks));
    clear_gaps_kernel<<<dim3(gaps, kGapBlocks / gaps), kThreads, 0, stream>>>(params.problem);
    cuda::check(cudaGetLastError(), "sm80 clearing gradients");
  }
  const PrepareParams arguments{params, warps, 0};
  p.dtype == DType::kBFloat16 ? launch_prepare<__nv_bfloat16>(arguments, stream)
                              : launch_prepare<__half>(arguments, stream);
}

void reduce_sinks(const BackwardKernelParams& params, cudaStream_t stream) {
  reduce_sinks_kernel<<<unsigned(params.problem.forward.num_heads), kSumThreads, 0, stream>>>(params);
  cuda::check(cudaGetLastError(), "sm80 dsinks");
}

void reduce_slopes(const BackwardKernelParams& params, int warps, cudaStream_t stream) {
  const ForwardParams& p = params.problem.forward;
  const int64_t numbers = p.num_heads * (params.problem.slopes_have_batch ? p.batch : 1);
  reduce_slopes_kernel<<<unsigned(numbers), kSumThreads, 0, stream>>>(params, warps);
  cuda::check(cudaGetLastError(), "sm80 dslopes");
}

}  // namespace flash_attn::cuda::sm80
