// dq from the sums of the kernels on tiles.
#include "../../../common/launch.h"
#include "row_block.h"
#include "rows.h"

namespace flash_attn::cuda::sm80 {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

struct StoreParams {
  BackwardKernelParams kernel;
  float scale;
  int64_t first_block;
};

/// A lane's numbers of a fragment.
SM80_DEVICE float4 load_fragment(const float* fragment, int lane) {
#if __CUDA_ARCH__ >= 900
  return __ldcs(reinterpret_cast<const float4*>(fragment + dq_place(lane, 0)));
#else
  return {__ldcs(fragment + dq_place(lane, 0)), __ldcs(fragment + dq_place(lane, 1)),
          __ldcs(fragment + dq_place(lane, 2)), __ldcs(fragment + dq_place(lane, 3))};
#endif
}

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

/// A block of query rows of one head; a warp takes 16 rows and 32 columns at a time.
template <typename Element>
__global__ void __launch_bounds__(kThreads) store_dq_kernel(const __grid_constant__ StoreParams arguments) {
  const BackwardKernelParams& params = arguments.kernel;
  const ForwardParams& p = params.problem.forward;
  RowBlock at;
  if (!find_row_block(params, arguments.first_block + blockIdx.x, at)) return;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, column_parts = params.columns / 32;
  const float* const accum = params.dq_accum + at.block * params.block_m * params.columns;
  const TensorView& dq = params.problem.dq;
  Element* const to = static_cast<Element*>(dq.data) +
                      row_offset(dq, p.cu_seqlens_q != nullptr, at.batch, at.sequence.q_row + at.row, at.head);
#pragma unroll 2
  for (int part = warp; part < params.block_m / 16 * column_parts; part += kWarps) {
    const int row_tile = part / column_parts, column = part % column_parts * 32;
    const float* const from = accum + (row_tile * params.columns + column) * 16;
    uint32_t upper[4], lower[4];  // rows lane / 4 and that + 8; of each of four tiles of eight columns
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 x = load_fragment(from + i * 128, lane);
      upper[i] = pack<Element>(x.x * arguments.scale, x.y * arguments.scale);
      lower[i] = pack<Element>(x.z * arguments.scale, x.w * arguments.scale);
    }
    exchange_words(upper);
    exchange_words(lower);
    const int columns = int(p.head_dim) - (column + 8 * (lane % 4));
    if (columns <= 0) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * row_tile + lane / 4 + 8 * half;
      if (at.row + row >= at.sequence.seqlen_q_padded) continue;
      uint4 x =
          half == 0 ? uint4{upper[0], upper[1], upper[2], upper[3]} : uint4{lower[0], lower[1], lower[2], lower[3]};
      if (at.row + row >= at.sequence.seqlen_q) x = uint4{};
      store_piece<true>(to + row * dq.row + column + 8 * (lane % 4), x, columns, params.aligned);
    }
  }
}

}  // namespace

void store_dq(const BackwardKernelParams& params, cudaStream_t stream) {
  const StoreParams arguments{params, float(params.problem.forward.softmax_scale), 0};
  auto* const kernel =
      params.problem.forward.dtype == DType::kBFloat16 ? store_dq_kernel<__nv_bfloat16> : store_dq_kernel<__half>;
  cuda::launch_blocks(kernel, arguments, num_row_blocks(params), kThreads, 0, stream, "sm80 backward dq");
}

}  // namespace flash_attn::cuda::sm80
