// Gradient of attn_mask: dS, summed over the dimensions along which the mask is broadcast. A block owns a tile of the
// mask and walks over every tile of scores that it was added to, in a fixed order. kFlagged: only the flagged heads'
// share, which is added to what is there, tile by tile; not of a mask that is broadcast along rows or columns.
#pragma once

#include <type_traits>

#include "backward_kernel.h"

namespace flash_attn::cuda::universal {
namespace {

/// Which tiles a block of the mask was added to along one dimension: all of them where the mask is broadcast.
struct Walk {
  int begin, end;
};

__device__ __forceinline__ bool is_flagged(const BackwardArguments& a, int b, int h) {
  return a.flags[b * int(a.params.forward.num_heads_k) + h / int(a.group_size)] != 0;
}

/// Adds dS of a tile from row m_own and column n_own of the mask on.
template <typename C>
__device__ __forceinline__ void add_tile(const BackwardArguments& a, int64_t m_own, int64_t n_own,
                                         const typename C::Acc (&ds)[C::kRows][C::kCols]) {
  const MaskView& mask = a.params.forward.mask;
  const int64_t slice = (a.first_block + blockIdx.x) / (a.num_parts * a.mask_row_blocks);
  auto* const gradient = static_cast<typename C::Acc*>(a.params.dmask) + slice * mask.row_size * mask.col_size;
#pragma unroll
  for (int i = 0; i < C::kRows; ++i) {
    const int64_t row = m_own + thread_row() + kThreadRows * i;
#pragma unroll
    for (int j = 0; j < C::kCols; ++j) {
      const int64_t column = n_own + thread_col() + kThreadCols * j;
      if (row < mask.row_size && column < mask.col_size) gradient[row * mask.col_size + column] += ds[i][j];
    }
  }
}

template <typename T, bool kFlagged>
__global__ void __launch_bounds__(kThreads, 2)
    mask_gradient_kernel(const __grid_constant__ BackwardArguments arguments) {
  using C = Config<T, 64, true>;
  using Acc = typename C::Acc;
  const BackwardParams& params = arguments.params;
  const ForwardParams& p = params.forward;
  const MaskView& mask = p.mask;
  auto& shared = shared_storage<C>();
  int64_t index = arguments.first_block + blockIdx.x;
  const int64_t column_blocks = arguments.num_parts, row_blocks = arguments.mask_row_blocks;
  const int64_t n_own = index % column_blocks * C::kBlock;
  index /= column_blocks;
  const int64_t m_own = index % row_blocks * C::kBlock;
  index /= row_blocks;
  const int mask_h = int(index % mask.head_size), mask_b = int(index / mask.head_size);
  const bool all_rows = mask.row_size == 1, all_columns = mask.col_size == 1;
  const Walk batches = mask.batch_size == 1 ? Walk{0, int(p.batch)} : Walk{mask_b, mask_b + 1};
  const Walk heads = mask.head_size == 1 ? Walk{0, int(p.num_heads)} : Walk{mask_h, mask_h + 1};
  Acc sum[C::kRows][C::kCols];
  clear(sum);
  for (int b = batches.begin; b < batches.end; ++b) {
    const SequenceInfo sequence = sequence_info(p, b);
    const int64_t m_end = all_rows || m_own + C::kBlock > sequence.seqlen_q ? sequence.seqlen_q : m_own + C::kBlock;
    for (int h = heads.begin; h < heads.end; ++h) {
      if (kFlagged && !is_flagged(arguments, b, h)) continue;
      for (int64_t m_begin = all_rows ? 0 : m_own; m_begin < m_end; m_begin += C::kBlock) {
        const int64_t last = m_begin + C::kBlock < m_end ? m_begin + C::kBlock : m_end;
        const Range visible = visible_columns(p, sequence, m_begin, last);
        int64_t n_begin = all_columns ? visible.begin / C::kBlock * C::kBlock : n_own;
        const int64_t n_end = all_columns || n_own + C::kBlock > visible.end ? visible.end : n_own + C::kBlock;
        if (n_begin + C::kBlock <= visible.begin) continue;
        for (; n_begin < n_end; n_begin += C::kBlock) {
          const ScoreTile t = score_tile<C::kBlock>(p, sequence, m_begin, n_begin);
          if (is_masked_out<C>(p, b, h, t)) continue;
          const BackwardHead<C> head(arguments, sequence, b, h);  // here, where registers are few
          const RowRange queries{0, t.queries}, keys = tile_range(visible, n_begin, C::kBlock);
          Acc s[C::kRows][C::kCols], dp[C::kRows][C::kCols], unused[C::kRows] = {};
          multiply<C>(head.dout, m_begin, queries, shared.scores, true, head.v, n_begin, keys, shared.streamed, dp);
          multiply<C>(head.q, m_begin, queries, shared.scores, true, head.k, n_begin, keys, shared.streamed, s);
          __syncthreads();  // the last tile's readers of lse and delta are done
          load_statistics<C>(arguments, head.first_row, t, shared);
          compute_gradients<C, false, Gradient::kOfScores>(p, head, t, shared, s, dp, unused);
          if constexpr (kFlagged) {
            add_tile<C>(arguments, m_own, n_own, dp);
          } else {
#pragma unroll
            for (int i = 0; i < C::kRows; ++i) {
#pragma unroll
              for (int j = 0; j < C::kCols; ++j) sum[i][j] += dp[i][j];
            }
          }
        }
      }
    }
  }
  if constexpr (kFlagged) return;
  __syncthreads();  // the last readers of shared.scores are done
  store_scores<C>(shared.scores, sum);
  __syncthreads();  // the sums are there
  const int rows = int(mask.row_size - m_own < C::kBlock ? mask.row_size - m_own : C::kBlock);
  const int columns = int(mask.col_size - n_own < C::kBlock ? mask.col_size - n_own : C::kBlock);
  const int64_t slice = (arguments.first_block + blockIdx.x) / (column_blocks * row_blocks);
  Acc* to = static_cast<Acc*>(params.dmask) + (slice * mask.row_size + m_own) * mask.col_size + n_own;
#pragma unroll 1
  for (int n = int(threadIdx.x); n < rows * columns; n += kThreads) {
    const int i = n / columns, j = n % columns;
    Acc total = Acc(0);
#pragma unroll 1
    for (int r = all_rows ? 0 : i; r < (all_rows ? C::kBlock : i + 1); ++r) {
#pragma unroll 1
      for (int c = all_columns ? 0 : j; c < (all_columns ? C::kBlock : j + 1); ++c) {
        total += shared.scores[r * C::kLdP + c];
      }
    }
    to[i * mask.col_size + j] = total;
  }
}

}  // namespace

template <typename T>
void launch_mask_gradient(const BackwardParams& params, const int* flags, cudaStream_t stream) {
  using C = Config<T, 64, true>;
  const MaskView& mask = params.forward.mask;
  BackwardArguments a = backward_arguments<T>(params);
  a.flags = flags;
  a.mask_row_blocks = ceil_div(mask.row_size, C::kBlock);
  a.num_parts = ceil_div(mask.col_size, C::kBlock);
  auto* kernel = mask_gradient_kernel<T, false>;
  if constexpr (std::is_same_v<T, float>) {
    if (flags != nullptr) kernel = mask_gradient_kernel<T, true>;
  }
  cuda::launch_blocks(kernel, a, mask.batch_size * mask.head_size * a.mask_row_blocks * a.num_parts, kThreads,
                      int(sizeof(SharedStorage<C>)), stream, "universal dmask");
}

}  // namespace flash_attn::cuda::universal
