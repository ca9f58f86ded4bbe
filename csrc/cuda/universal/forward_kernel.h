// Forward: a block owns kBlock query rows of one head and kHeadDim columns of the output, and walks over the key rows
// that they see with an online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
#pragma once

#include "../common/launch.h"
#include "../common/tiles/sequence_blocks.h"
#include "forward_launch.h"
#include "scores.h"

namespace flash_attn::cuda::universal {
namespace {

struct ForwardArguments {
  ForwardParams params;
  SequenceBlocks m_blocks;
  int64_t first_block, num_parts, group_size;  // parts: of head_dim_v
  const int* flags;                            // see launch_forward()
  bool q_quads, k_quads, v_quads, out_quads;
};

/// Per-thread state: every row's values are the same in its 16 lanes, but for row_sum, which holds a lane's share.
template <typename C>
struct OnlineSoftmax {
  using Acc = typename C::Acc;
  Acc row_max[C::kRows], row_sum[C::kRows];
  Acc o[C::kSlices][C::kRows][C::kOutCols];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) row_max[i] = minus_infinity<Acc>(), row_sum[i] = Acc(0);
#pragma unroll
    for (int n = 0; n < C::kSlices; ++n) clear(o[n]);
  }

  /// Scores become probabilities relative to the new maximum; what was summed up follows it.
  __device__ __forceinline__ void update(Acc (&s)[C::kRows][C::kCols]) {
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
      Acc high = row_max[i];
#pragma unroll
      for (int j = 0; j < C::kCols; ++j) high = max(high, s[i][j]);
#pragma unroll
      for (int lane = 1; lane < kThreadCols; lane *= 2) high = max(high, __shfl_xor_sync(0xffffffffu, high, lane));
      const Acc base = high == minus_infinity<Acc>() ? Acc(0) : high;
      const Acc shrink = exponential(row_max[i] - base);
      row_max[i] = high;
      Acc sum = Acc(0);
#pragma unroll
      for (int j = 0; j < C::kCols; ++j) sum += s[i][j] = exponential(s[i][j] - base);
      row_sum[i] = row_sum[i] * shrink + sum;
#pragma unroll
      for (int n = 0; n < C::kSlices; ++n) {
#pragma unroll
        for (int c = 0; c < C::kOutCols; ++c) o[n][i][c] *= shrink;
      }
    }
  }

  /// The row's lse; row_sum becomes what its output is to be multiplied by.
  __device__ __forceinline__ Acc finish(int i, Acc sink) {
    Acc sum = row_sum[i];
#pragma unroll
    for (int lane = 1; lane < kThreadCols; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    const Acc high = max(row_max[i], sink);
    const Acc base = high == minus_infinity<Acc>() ? Acc(0) : high;
    const Acc shrink = exponential(row_max[i] - base);
    sum = sum * shrink + exponential(sink - base);
    row_sum[i] = sum == Acc(0) ? Acc(0) : shrink / sum;
    return sum == Acc(0) ? minus_infinity<Acc>() : base + logarithm(sum);
  }
};

/// s = q k^T over the whole head dimension. A single chunk of q stays in shared.resident from the first block on.
template <typename C>
__device__ __forceinline__ void compute_scores(const Matrix<typename C::Element>& q,
                                               const Matrix<typename C::Element>& k, const ScoreTile& t,
                                               RowRange q_rows, RowRange k_rows, bool first, SharedStorage<C>& shared,
                                               typename C::Acc (&s)[C::kRows][C::kCols]) {
  clear(s);
  for (int64_t column = 0; column < q.columns; column += C::kWidth) {
    __syncthreads();  // the last readers of both tiles are done
    if (first || q.columns > C::kWidth) load_tile<C>(shared.resident, q, t.m_begin, column, q_rows);
    load_tile<C>(shared.scores, k, t.n_begin, column, k_rows);
    __syncthreads();  // both tiles are there
    add_scores<C>(shared.resident, shared.scores, q.columns - column, s);
  }
}

/// From products to scores, and to what dropout leaves of the probabilities in shared.scores.
template <typename C>
__device__ __forceinline__ void compute_probabilities(const ForwardParams& p, const ScoreRules<C>& rules,
                                                      const ScoreTile& t, int64_t b, int64_t h,
                                                      SharedStorage<C>& shared,
                                                      typename C::Acc (&s)[C::kRows][C::kCols],
                                                      OnlineSoftmax<C>& softmax) {
  using Acc = typename C::Acc;
  if constexpr (C::kExtended) {
    if (rules.masked) load_mask<C, false, 4>(p.mask, b, h, t, shared);
    if (rules.dropout) draw_dropout<C::kBlock>(p, b * p.num_heads + h, t, shared.keep);
  }
#pragma unroll
  for (int i = 0; i < C::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < C::kCols; ++j) {
      const int row = thread_row() + kThreadRows * i, column = thread_col() + kThreadCols * j;
      Acc tanh;
      s[i][j] = rules.score(t, row, column, s[i][j], shared.scores + row * C::kLdP + column, tanh);
    }
  }
  softmax.update(s);
  if constexpr (C::kExtended) {
    if (rules.dropout) {
#pragma unroll
      for (int i = 0; i < C::kRows; ++i) {
#pragma unroll
        for (int j = 0; j < C::kCols; ++j) {
          if (!is_kept(shared, thread_row() + kThreadRows * i, thread_col() + kThreadCols * j)) s[i][j] = Acc(0);
        }
      }
    }
  }
  __syncthreads();  // everyone has read its keys; with a mask, each thread overwrites what it alone reads
  store_scores<C>(shared.scores, s);
}

/// k or v of a sequence; from pages, whose rows find_pages() finds for each tile.
template <typename C>
__device__ __forceinline__ Matrix<typename C::Element> key_matrix(const TensorView& view, const KeyRows& rows,
                                                                  int64_t row, int64_t head, int64_t columns,
                                                                  bool quads, const int64_t* places) {
  auto* const data = static_cast<typename C::Element*>(view.data) + head * view.head;
  if (rows.pages != nullptr) return {data, 0, columns, quads, places};
  return {data + rows.offset(view, row), view.row, columns, quads};
}

/// shared.places of the rows [begin, end) of a tile, whose first row is `row`. Nobody reads those of another tile any
/// more, since all have met after they loaded v; and whoever loads k meets all first.
template <typename C>
__device__ __forceinline__ void find_pages(const ForwardParams& p, const KeyRows& rows, int64_t row, RowRange range,
                                           SharedStorage<C>& shared) {
  const int r = int(threadIdx.x) % C::kBlock, of_v = int(threadIdx.x) / C::kBlock;
  if (of_v < 2 && range.holds(r)) shared.places[of_v][r] = rows.offset(of_v == 0 ? p.k : p.v, row + r);
}

template <typename T, int kHeadDim, bool kExtended, bool kCached>
__global__ void __launch_bounds__(kThreads, kCached ? 2 : kForwardBlocksPerSm<T, kHeadDim, kExtended>)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  using C = Config<T, kHeadDim, kExtended, kCached>;
  using Acc = typename C::Acc;
  const ForwardParams& p = arguments.params;
  auto& shared = shared_storage<C>();
  int64_t index = arguments.first_block + blockIdx.x;
  const int64_t part_column = index % arguments.num_parts * kHeadDim;
  index /= arguments.num_parts;
  const auto [b, h, m_block] = arguments.m_blocks.find_of_heads(index, p.num_heads, /*descending=*/true);
  const int64_t m_begin = m_block * C::kBlock;
  const SequenceInfo sequence = kCached ? cached_sequence_info(p, b) : sequence_info(p, b);
  if (m_begin < 0 || m_begin >= sequence.seqlen_q) return;
  const int64_t m_end = m_begin + C::kBlock < sequence.seqlen_q ? m_begin + C::kBlock : sequence.seqlen_q;
  const int rows = int(m_end - m_begin);
  const int64_t h_k = h / arguments.group_size;
  if (arguments.flags != nullptr && arguments.flags[b * p.num_heads_k + h_k] == 0) return;
  const auto q = head_matrix<T>(p.q, b, sequence.q_row, h, p.head_dim, arguments.q_quads);
  const KeyRows rows_k = kCached ? key_rows(p.cache, b) : KeyRows{nullptr, b, 0, 0};
  const auto k = key_matrix<C>(p.k, rows_k, sequence.k_row, h_k, p.head_dim, arguments.k_quads, shared.places[0]);
  const auto v = key_matrix<C>(p.v, rows_k, sequence.k_row, h_k, p.head_dim_v, arguments.v_quads, shared.places[1]);
  const ScoreRules<C> rules(p, b, h);
  const Range visible = visible_columns(p, sequence, m_begin, m_end);
  OnlineSoftmax<C> softmax;

  bool first = true;
  for (int64_t n_begin = visible.begin / C::kBlock * C::kBlock; n_begin < visible.end; n_begin += C::kBlock) {
    const ScoreTile t = score_tile<C::kBlock>(p, sequence, m_begin, n_begin);
    if (is_masked_out<C>(p, b, h, t)) continue;
    const RowRange k_rows{int(visible.begin > n_begin ? visible.begin - n_begin : 0),
                          int(visible.end - n_begin < C::kBlock ? visible.end - n_begin : C::kBlock)};
    if constexpr (kCached) {
      if (rows_k.pages != nullptr) find_pages<C>(p, rows_k, sequence.k_row + n_begin, k_rows, shared);
    }
    Acc s[C::kRows][C::kCols];
    compute_scores<C>(q, k, t, {0, rows}, k_rows, first, shared, s);
    first = false;
    compute_probabilities<C>(p, rules, t, b, h, shared, s, softmax);
#pragma unroll
    for (int n = 0; n < C::kSlices; ++n) {
      const int64_t column = part_column + n * C::kWidth;
      if (column >= p.head_dim_v) break;
      __syncthreads();  // the last readers of the streamed tile are done
      load_tile<C>(shared.streamed, v, n_begin, column, k_rows, rules.masked ? shared.alive[0] : nullptr);
      __syncthreads();  // values and probabilities are there
      add_product<C>(shared.scores, shared.streamed, softmax.o[n]);
    }
  }

  const Acc sink = p.sinks != nullptr ? static_cast<const Acc*>(p.sinks)[h] : minus_infinity<Acc>();
  Acc* lse = static_cast<Acc*>(p.lse.data) + b * p.lse.batch + h * p.lse.head + (sequence.q_row + m_begin) * p.lse.row;
#pragma unroll
  for (int i = 0; i < C::kRows; ++i) {
    const int row = thread_row() + kThreadRows * i;
    const Acc value = softmax.finish(i, sink);
    if (part_column == 0 && thread_col() == 0 && row < rows) lse[row * p.lse.row] = value;
  }
  const auto out = head_matrix<T>(p.out, b, sequence.q_row, h, p.head_dim_v, arguments.out_quads);
#pragma unroll
  for (int n = 0; n < C::kSlices; ++n) {
    store_product<C>(out, m_begin, part_column + n * C::kWidth, rows, softmax.o[n],
                     [&](int i) { return softmax.row_sum[i] * rules.dropout_scale; });
  }
}

template <typename T, int kHeadDim, bool kExtended, bool kCached = false>
void launch_forward_kernel(const ForwardParams& p, const int* flags, cudaStream_t stream) {
  using C = Config<T, kHeadDim, kExtended, kCached>;
  ForwardArguments arguments;
  arguments.params = p;
  arguments.m_blocks = SequenceBlocks::of_queries(p, C::kBlock);
  arguments.num_parts = p.head_dim_v > 0 ? ceil_div(p.head_dim_v, kHeadDim) : 1;
  arguments.group_size = p.group_size();
  arguments.flags = flags;
  arguments.q_quads = is_quad_aligned(p.q, p.head_dim, sizeof(T));
  arguments.k_quads = is_quad_aligned(p.k, p.head_dim, sizeof(T));
  arguments.v_quads = is_quad_aligned(p.v, p.head_dim_v, sizeof(T));
  arguments.out_quads = is_quad_aligned(p.out, p.head_dim_v, sizeof(T));
  cuda::launch_blocks(forward_kernel<T, kHeadDim, kExtended, kCached>, arguments,
                      arguments.m_blocks.count() * p.num_heads * arguments.num_parts, kThreads,
                      int(sizeof(SharedStorage<C>)), stream, "universal forward");
}

}  // namespace

template <typename T>
void launch_forward(const ForwardParams& p, const int* flags, cudaStream_t stream) {
  if (p.cache.exists()) return launch_forward_kernel<T, 64, true, true>(p, flags, stream);
  const auto launch = [&](auto* plain, auto* extended) { (is_extended(p) ? extended : plain)(p, flags, stream); };
  switch (forward_bucket(p)) {
    case 16: return launch_forward_kernel<T, 16, false>(p, flags, stream);
    case 64: return launch(launch_forward_kernel<T, 64, false>, launch_forward_kernel<T, 64, true>);
    default: return launch(launch_forward_kernel<T, 128, false>, launch_forward_kernel<T, 128, true>);
  }
}

}  // namespace flash_attn::cuda::universal
