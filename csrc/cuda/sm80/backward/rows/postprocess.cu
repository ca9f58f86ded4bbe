// dq from the sums of the kernels on tiles, and dk and dv where they are in parts.
#include "../../../common/dependent_launch.h"
#include "../../../common/launch.h"
#include "row_share.h"
#include "rows.h"

namespace flash_attn::cuda::sm80 {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

struct StoreParams {
  BackwardKernelParams kernel;
  float scale;
};

/// Of a quad's 4 x 4 words, word[i] of lane j becomes word[j] of lane i.
SM80_DEVICE void exchange_words(uint32_t (&word)[4]) {
  const int lane = int(threadIdx.x);
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? word[i] : word[i | step], step);
      (upper ? word[i] : word[i | step]) = got;
    }
  }
}

/// Sixteen rows by 32 columns of sums, in the order of fragments, to `to`, their first element, by a warp. `from`: the
/// first fragment of as many sums as there are `parts`, `stride` apart. From row `exist` on there are zeros, from row
/// `rows` on nothing; likewise columns.
template <typename Element>
SM80_DEVICE void store_sums(Element* to, int64_t row_stride, const float* from, int parts, int64_t stride, float scale,
                            int exist, int rows, int columns, bool aligned) {
  const int lane = int(threadIdx.x) % 32;
  uint32_t upper[4], lower[4];  // rows lane / 4 and that + 8; of each of four tiles of eight columns
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float4 x = load_accumulated(from + i * 128, lane);
#pragma unroll 2
    for (int part = 1; part < parts; ++part) {
      const float4 y = load_accumulated(from + part * stride + i * 128, lane);
      x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    }
    upper[i] = pack<Element>(x.x * scale, x.y * scale);
    lower[i] = pack<Element>(x.z * scale, x.w * scale);
  }
  exchange_words(upper);
  exchange_words(lower);
  columns -= 8 * (lane % 4);
  if (columns <= 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    if (row >= rows) continue;
    uint4 x = half == 0 ? uint4{upper[0], upper[1], upper[2], upper[3]} : uint4{lower[0], lower[1], lower[2], lower[3]};
    if (row >= exist) x = uint4{};
    store_piece<true>(to + row * row_stride + 8 * (lane % 4), x, columns, aligned);
  }
}

/// A share of a block of query rows; a warp takes 16 rows and 32 columns at a time.
template <typename Element>
__global__ void __launch_bounds__(kThreads) store_dq_kernel(const __grid_constant__ StoreParams arguments) {
  const BackwardKernelParams& params = arguments.kernel;
  const ForwardParams& p = params.problem.forward;
  grid_dependency_wait();  // for dq_accum
  RowShare at;
  if (!find_row_share(params, blockIdx.x, at)) return;
  const int warp = int(threadIdx.x) / 32, column_parts = params.columns / 32;
  const float* const accum = params.dq_accum + (at.block * params.block_m + at.first) * params.columns;
  const TensorView& dq = params.problem.dq;
  Element* const to = static_cast<Element*>(dq.data) +
                      row_offset(dq, p.cu_seqlens_q != nullptr, at.batch, at.sequence.q_row + at.row(), at.head);
  const int exist = int(at.sequence.seqlen_q - at.row()), rows = int(at.sequence.seqlen_q_padded - at.row());
#pragma unroll 2
  for (int part = warp; part < params.share_rows / 16 * column_parts; part += kWarps) {
    const int row = part / column_parts * 16, column = part % column_parts * 32;
    store_sums(to + row * dq.row + column, dq.row, accum + row * params.columns + column * 16, 1, 0, arguments.scale,
               exist - row, rows - row, int(p.head_dim) - column, params.aligned);
  }
}

/// dk and dv of sixteen keys, from the parts of a dense problem.
template <typename Element>
__global__ void __launch_bounds__(kThreads) store_keys_kernel(const __grid_constant__ StoreParams arguments) {
  const BackwardKernelParams& params = arguments.kernel;
  const ForwardParams& p = params.problem.forward;
  grid_dependency_wait();  // for the parts
  const uint32_t strips = uint32_t(params.block_n) / 16, index = blockIdx.x;
  const uint32_t strip = index / 2 % strips, block = index / 2 / strips;
  const uint32_t head = block / uint32_t(params.num_n_blocks), number = block - head * uint32_t(params.num_n_blocks);
  const bool is_dk = index % 2 == 0;
  const TensorView& view = is_dk ? params.problem.dk : params.problem.dv;
  const int row = int(number) * params.block_n + int(strip) * 16, rows = int(p.seqlen_k) - row;
  if (view.data == nullptr || rows <= 0) return;
  const int64_t stride = int64_t{params.block_n} * params.columns;
  const float* const from = (is_dk ? params.dk_parts : params.dv_parts) + int64_t{block} * params.parts * stride +
                            int64_t{strip} * 16 * params.columns;
  const uint32_t heads = uint32_t(p.num_heads_k);
  Element* const to =
      static_cast<Element*>(view.data) + row_offset(view, false, int(head / heads), row, int(head % heads));
  const int columns = int(is_dk ? p.head_dim : p.head_dim_v);
  for (int column = int(threadIdx.x) / 32 * 32; column < params.columns; column += 32 * kWarps) {
    store_sums(to + column, view.row, from + column * 16, params.parts, stride, 1.f, rows, rows, columns - column,
               params.aligned);
  }
}

}  // namespace

void store_dq(const BackwardKernelParams& params, cudaStream_t stream) {
  const StoreParams arguments{params, float(params.problem.forward.softmax_scale)};
  auto* const kernel =
      params.problem.forward.dtype == DType::kBFloat16 ? store_dq_kernel<__nv_bfloat16> : store_dq_kernel<__half>;
  cuda::launch_dependent(kernel, dim3(unsigned(num_row_shares(params))), kThreads, 0, stream, arguments,
                         "sm80 backward dq");
}

void store_keys(const BackwardKernelParams& params, int64_t blocks, cudaStream_t stream) {
  const StoreParams arguments{params, 1.f};
  auto* const kernel =
      params.problem.forward.dtype == DType::kBFloat16 ? store_keys_kernel<__nv_bfloat16> : store_keys_kernel<__half>;
  cuda::launch_dependent(kernel, dim3(unsigned(blocks * (params.block_n / 16) * 2)), kThreads, 0, stream, arguments,
                         "sm80 backward dk, dv");
}

}  // namespace flash_attn::cuda::sm80
