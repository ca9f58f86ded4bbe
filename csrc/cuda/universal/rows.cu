#include "../common/launch.h"
#include "../common/scores/lost_of_lse.h"
#include "extended.h"
#include "rows.h"
#include "scores.h"

namespace flash_attn::cuda::universal {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = kThreads / kWarp;
constexpr int64_t kAlignment = 16;

struct FillArguments {
  TensorView view;
  int64_t first_block, rows, heads, columns, num_rows;
  double value;
};

/// A warp fills the columns of one (batch, row, head).
template <typename T>
__global__ void __launch_bounds__(kThreads) fill_kernel(const __grid_constant__ FillArguments arguments) {
  int64_t index = (arguments.first_block + blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (index >= arguments.num_rows) return;
  const int64_t h = index % arguments.heads;
  index /= arguments.heads;
  const TensorView& view = arguments.view;
  T* data = static_cast<T*>(view.data) + index / arguments.rows * view.batch + index % arguments.rows * view.row +
            h * view.head;
  for (int64_t c = threadIdx.x % kWarp; c < arguments.columns; c += kWarp) data[c] = T(arguments.value);
}

void fill(const TensorView& view, int element_size, int64_t batch, int64_t rows, int64_t heads, int64_t columns,
          double value, cudaStream_t stream) {
  if (columns == 0) return;
  const FillArguments arguments{view, 0, rows, heads, columns, batch * rows * heads, value};
  // 0 has the same bits in bfloat16 and in float16.
  auto* kernel = element_size == 8 ? fill_kernel<double> : element_size == 4 ? fill_kernel<float> : fill_kernel<__half>;
  cuda::launch_blocks(kernel, arguments, ceil_div(arguments.num_rows, kRowsPerBlock), kThreads, 0, stream,
                      "universal fill");
}

struct RowArguments {
  BackwardParams params;
  RowWorkspace rows;
  int64_t first_block, num_rows;
  bool changed;  // scores, by more than a scale
  int* flags;    // see prepare_rows()
};

/// By a warp; `row` counts from the start of the tensor.
template <typename T, typename Acc>
__device__ Acc lost_of_row(const RowArguments& arguments, int64_t b, int64_t h, int64_t row, Acc lse) {
  const ForwardParams& p = arguments.params.forward;
  int64_t sequence = b;
  while (p.cu_seqlens_q != nullptr && sequence + 1 < p.batch && p.cu_seqlens_q[sequence + 1] <= row) ++sequence;
  const SequenceInfo info = sequence_info(p, sequence);
  if (arguments.flags != nullptr) arguments.flags[sequence * p.num_heads_k + h / (p.num_heads / p.num_heads_k)] = 1;
  const auto mask_value = [&](int64_t place) {
    return with_mask_type(p.mask.dtype,
                          [&](auto* type) { return bias_of<Acc>(static_cast<decltype(type)>(p.mask.data)[place]); });
  };
  return RowCounter<T, Acc>{p, info, sequence, h, arguments.changed}.lost_of(row - info.q_row, lse, mask_value);
}

/// A warp computes delta and what is lost of lse of one (head, row).
template <typename T>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ RowArguments arguments) {
  using Acc = typename AccumulatorOf<T>::type;
  const ForwardParams& p = arguments.params.forward;
  const int64_t index = (arguments.first_block + blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (index >= arguments.num_rows) return;
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t h = index / p.total_q, place = index % p.total_q;
  const int64_t b = p.cu_seqlens_q != nullptr ? 0 : place / p.seqlen_q;
  const int64_t row = p.cu_seqlens_q != nullptr ? place : place % p.seqlen_q;
  const T* out = head_matrix<T>(p.out, b, row, h, p.head_dim_v, false).data;
  const T* dout = head_matrix<T>(arguments.params.dout, b, row, h, p.head_dim_v, false).data;
  Acc sum = Acc(0);
  for (int64_t c = lane; c < p.head_dim_v; c += kWarp) sum += Acc(to_acc(out[c])) * Acc(to_acc(dout[c]));
#pragma unroll
  for (int other = 1; other < kWarp; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  const Acc lse = static_cast<const Acc*>(p.lse.data)[b * p.lse.batch + h * p.lse.head + row * p.lse.row];
  const Acc lost = is_large_lse<T>(lse) ? lost_of_row<T>(arguments, b, h, row, lse) : Acc(0);
  if (lane != 0) return;
  const RowView& dlse = arguments.params.dlse;
  if (dlse.data != nullptr) sum -= static_cast<const Acc*>(dlse.data)[b * dlse.batch + h * dlse.head + row * dlse.row];
  static_cast<Acc*>(arguments.rows.lse)[index] = lse == minus_infinity<Acc>() ? Acc(0) : lse;
  static_cast<Acc*>(arguments.rows.lost)[index] = lost;
  static_cast<Acc*>(arguments.rows.delta)[index] = sum;
}

/// Sum over the threads of the block, in thread 0.
__device__ double block_sum(double x) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = x;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();  // the sums so far are there
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

/// A block computes one number of dslopes, or of dsinks if kSinks: a sum over a head's rows, of one sequence or of all.
template <typename Acc, bool kSinks>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const __grid_constant__ RowArguments arguments) {
  const ForwardParams& p = arguments.params.forward;
  const int64_t index = arguments.first_block + blockIdx.x;
  const bool one = !kSinks && arguments.params.slopes_have_batch;
  const int64_t h = index % p.num_heads, b_begin = one ? index / p.num_heads : 0, b_end = one ? b_begin + 1 : p.batch;
  const Acc sink = kSinks ? static_cast<const Acc*>(p.sinks)[h] : Acc(0);
  double sum = 0;
  for (int64_t b = b_begin; b < b_end; ++b) {
    const SequenceInfo sequence = sequence_info(p, b);
    const int64_t first = h * p.total_q + (p.cu_seqlens_q != nullptr ? sequence.q_row : b * p.seqlen_q);
    for (int64_t row = threadIdx.x; row < sequence.seqlen_q; row += kThreads) {
      if constexpr (kSinks) {
        if (sink == minus_infinity<Acc>()) continue;
        const Acc lse = static_cast<const Acc*>(arguments.rows.lse)[first + row];
        const Acc lost = static_cast<const Acc*>(arguments.rows.lost)[first + row];
        sum -= double(exponential((sink - lse) - lost) * static_cast<const Acc*>(arguments.rows.delta)[first + row]);
      } else {
        sum -= double(static_cast<const Acc*>(arguments.rows.slope_sum)[first + row]);
      }
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0)
    static_cast<Acc*>(kSinks ? arguments.params.dsinks : arguments.params.dslopes)[index] = Acc(sum);
}

template <typename Acc>
void reduce_rows_as(const RowArguments& arguments, cudaStream_t stream) {
  const BackwardParams& params = arguments.params;
  const int64_t heads = params.forward.num_heads;
  if (params.dsinks != nullptr) {
    cuda::launch_blocks(reduce_kernel<Acc, true>, arguments, heads, kThreads, 0, stream, "universal dsinks");
  }
  if (params.dslopes != nullptr) {
    cuda::launch_blocks(reduce_kernel<Acc, false>, arguments,
                        params.slopes_have_batch ? params.forward.batch * heads : heads, kThreads, 0, stream,
                        "universal dslopes");
  }
}

int64_t array_bytes(const ForwardParams& p) {
  const int64_t bytes = p.num_heads * p.total_q * size_of(statistics_dtype(p.dtype));
  return ceil_div(bytes, kAlignment) * kAlignment;
}

}  // namespace

int64_t RowWorkspace::bytes(const BackwardParams& params) {
  return array_bytes(params.forward) * (params.dslopes != nullptr ? 4 : 3);
}

RowWorkspace RowWorkspace::in(const BackwardParams& params) {
  char* start = static_cast<char*>(params.forward.workspace);
  const int64_t bytes = array_bytes(params.forward);
  return {start, start + bytes, start + 2 * bytes, params.dslopes != nullptr ? start + 3 * bytes : nullptr};
}

void fill_rows(const TensorView& view, DType dtype, int64_t batch, int64_t rows, int64_t heads, int64_t columns,
               cudaStream_t stream) {
  fill(view, size_of(dtype), batch, rows, heads, columns, 0.0, stream);
}

void fill_lse(const ForwardParams& p, cudaStream_t stream) {
  const TensorView view{p.lse.data, p.lse.batch, p.lse.row, p.lse.head};
  const bool packed = p.is_varlen_q();
  fill(view, size_of(statistics_dtype(p.dtype)), packed ? 1 : p.batch, packed ? p.total_q : p.seqlen_q, p.num_heads, 1,
       -__builtin_huge_val(), stream);
}

void fill_gradients(const BackwardParams& params, cudaStream_t stream) {
  const ForwardParams& p = params.forward;
  const auto fill = [&](const TensorView& view, bool packed, bool used, int64_t total, int64_t seqlen, int64_t heads,
                        int64_t columns) {
    if (view.data == nullptr || !(packed || used)) return;
    fill_rows(view, p.dtype, packed ? 1 : p.batch, packed ? total : seqlen, heads, columns, stream);
  };
  const bool used_q = p.seqused_q != nullptr, used_k = p.seqused_k != nullptr;
  fill(params.dq, p.is_varlen_q(), used_q, p.total_q, p.seqlen_q, p.num_heads, p.head_dim);
  fill(params.dk, p.is_varlen_k(), used_k, p.total_k, p.seqlen_k, p.num_heads_k, p.head_dim);
  fill(params.dv, p.is_varlen_k(), used_k, p.total_k, p.seqlen_k, p.num_heads_k, p.head_dim_v);
}

void prepare_rows(const BackwardParams& params, int* flags, cudaStream_t stream) {
  const ForwardParams& p = params.forward;
  const RowArguments arguments{params, RowWorkspace::in(params), 0, p.num_heads * p.total_q, is_extended(p), flags};
  auto* kernel = p.dtype == DType::kFloat64    ? prepare_kernel<double>
                 : p.dtype == DType::kFloat32  ? prepare_kernel<float>
                 : p.dtype == DType::kBFloat16 ? prepare_kernel<__nv_bfloat16>
                                               : prepare_kernel<__half>;
  cuda::launch_blocks(kernel, arguments, ceil_div(arguments.num_rows, kRowsPerBlock), kThreads, 0, stream,
                      "universal delta");
}

void reduce_rows(const BackwardParams& params, cudaStream_t stream) {
  const RowArguments arguments{params, RowWorkspace::in(params), 0, 0, false, nullptr};
  if (params.forward.dtype == DType::kFloat64) {
    reduce_rows_as<double>(arguments, stream);
  } else {
    reduce_rows_as<float>(arguments, stream);
  }
}

}  // namespace flash_attn::cuda::universal
