// Backward, one kernel for dk and dv and one for dq, so that every sum has one owner and a fixed order. Both compute
// the scores anew from lse (Dao et al., "FlashAttention", 2022, algorithm 4).
#pragma once

#include "backward_tile.h"

namespace flash_attn::cuda::universal {
namespace {

__device__ __forceinline__ RowRange tile_range(const Range& range, int64_t begin, int block) {
  return {int(range.begin > begin ? range.begin - begin : 0),
          int(range.end - begin < block ? range.end - begin : block)};
}

/// A block owns kBlock key rows of one key head and kHeadDim columns of dk and dv. It walks over the query rows that
/// see them, of every query head of the group. Rows of its tiles are keys.
template <typename T, int kHeadDim, bool kExtended>
__global__ void __launch_bounds__(kThreads, 2) dkdv_kernel(const __grid_constant__ BackwardArguments arguments) {
  using C = Config<T, kHeadDim, kExtended>;
  using Acc = typename C::Acc;
  static_assert(C::kSlices == 1, "dk and dv of a wider block need too many registers");
  const BackwardParams& params = arguments.params;
  const ForwardParams& p = params.forward;
  auto& shared = shared_storage<C>();
  int64_t index = arguments.first_block + blockIdx.x;
  const int part = int(index % arguments.num_parts) * kHeadDim;
  index /= arguments.num_parts;
  const auto [b, head_k, n_block] = arguments.blocks.find_of_heads(index, p.num_heads_k, /*descending=*/false);
  const int64_t n_begin = n_block * C::kBlock;
  const int h_k = int(head_k), group_size = int(arguments.group_size);
  const SequenceInfo sequence = sequence_info(p, b);
  if (n_begin < 0 || n_begin >= sequence.seqlen_k || !is_wanted(arguments, b, h_k)) return;
  const int64_t n_end = n_begin + C::kBlock < sequence.seqlen_k ? n_begin + C::kBlock : sequence.seqlen_k;
  const RowRange keys{0, int(n_end - n_begin)};
  const bool want_dk = params.dk.data != nullptr && part < p.head_dim;
  const bool want_dv = params.dv.data != nullptr && part < p.head_dim_v;
  const Range visible = visible_rows(p, sequence, n_begin, n_end);
  Acc dk[C::kRows][C::kOutCols], dv[C::kRows][C::kOutCols];
  clear(dk), clear(dv);
  bool first = true;
  for (int h = h_k * group_size; h < (h_k + 1) * group_size; ++h) {
    const BackwardHead<C> head(arguments, sequence, b, h);
    for (int64_t m_begin = visible.begin / C::kBlock * C::kBlock; m_begin < visible.end; m_begin += C::kBlock) {
      const ScoreTile t = score_tile<C::kBlock>(p, sequence, m_begin, n_begin);
      if (is_masked_out<C>(p, b, h, t)) continue;
      const RowRange queries = tile_range(visible, m_begin, C::kBlock);
      Acc s[C::kRows][C::kCols], dp[C::kRows][C::kCols], unused[C::kRows] = {};
      multiply<C>(head.k, n_begin, keys, shared.resident, first, head.q, m_begin, queries, shared.scores, s);
      first = false;
      multiply<C>(head.v, n_begin, keys, shared.scores, true, head.dout, m_begin, queries, shared.streamed, dp);
      __syncthreads();  // the last tile's readers of lse and delta are done, with no columns at all, too
      load_statistics<C>(arguments, head.first_row, t, shared);
      __syncthreads();  // lse and delta are there; the values in shared.scores are no longer needed
      compute_gradients<C, true, Gradient::kOfProducts>(p, head, t, shared, s, dp, unused);
      const uint8_t* alive = head.rules.masked ? shared.alive[0] : nullptr;
      if (want_dv) {
        store_scores<C>(shared.scores, s);  // each thread overwrites what it alone has read of the mask
        if (alive != nullptr || p.head_dim_v > C::kWidth) {
          load_tile<C>(shared.streamed, head.dout, m_begin, part, queries, alive);
        }
        __syncthreads();  // P and dout are there
        add_product<C>(shared.scores, shared.streamed, dv);
      }
      if (want_dk) {
        __syncthreads();  // the readers of P and dout are done
        store_scores<C>(shared.scores, dp);
        load_tile<C>(shared.streamed, head.q, m_begin, part, queries, alive);
        __syncthreads();  // dS and q are there
        add_product<C>(shared.scores, shared.streamed, dk);
      }
    }
  }
  if (want_dk) {
    const auto to = head_matrix<T>(params.dk, b, sequence.k_row, h_k, p.head_dim, arguments.dk_quads);
    store_product<C>(to, n_begin, part, keys.end, dk, [&](int) { return Acc(p.softmax_scale); });
  }
  if (want_dv) {
    const auto to = head_matrix<T>(params.dv, b, sequence.k_row, h_k, p.head_dim_v, arguments.dv_quads);
    store_product<C>(to, n_begin, part, keys.end, dv, [](int) { return Acc(1); });
  }
}

/// A block owns kBlock query rows of one head and kHeadDim columns of dq, and walks over the key rows that they see.
template <typename T, int kHeadDim, bool kExtended>
__global__ void __launch_bounds__(kThreads, kExtended || sizeof(T) == 8 ? 2 : 3)
    dq_kernel(const __grid_constant__ BackwardArguments arguments) {
  using C = Config<T, kHeadDim, kExtended>;
  using Acc = typename C::Acc;
  const BackwardParams& params = arguments.params;
  const ForwardParams& p = params.forward;
  auto& shared = shared_storage<C>();
  int64_t index = arguments.first_block + blockIdx.x;
  const int64_t part = index % arguments.num_parts * kHeadDim;
  index /= arguments.num_parts;
  const auto [b, h, m_block] = arguments.blocks.find_of_heads(index, p.num_heads, /*descending=*/true);
  const int64_t m_begin = m_block * C::kBlock;
  const SequenceInfo sequence = sequence_info(p, b);
  if (m_begin < 0 || m_begin >= sequence.seqlen_q || !is_wanted(arguments, b, h / arguments.group_size)) return;
  const int64_t m_end = m_begin + C::kBlock < sequence.seqlen_q ? m_begin + C::kBlock : sequence.seqlen_q;
  const RowRange queries{0, int(m_end - m_begin)};
  const BackwardHead<C> head(arguments, sequence, b, int(h));
  const Range visible = visible_columns(p, sequence, m_begin, m_end);
  Acc dq[C::kRows][C::kOutCols], slope_sum[C::kRows] = {};
  clear(dq);
  load_statistics<C>(arguments, head.first_row, score_tile<C::kBlock>(p, sequence, m_begin, 0), shared);
  bool first = true;
  for (int64_t n_begin = visible.begin / C::kBlock * C::kBlock; n_begin < visible.end; n_begin += C::kBlock) {
    const ScoreTile t = score_tile<C::kBlock>(p, sequence, m_begin, n_begin);
    if (is_masked_out<C>(p, b, h, t)) continue;
    const RowRange keys = tile_range(visible, n_begin, C::kBlock);
    Acc s[C::kRows][C::kCols], dp[C::kRows][C::kCols];
    multiply<C>(head.dout, m_begin, queries, shared.scores, true, head.v, n_begin, keys, shared.streamed, dp);
    multiply<C>(head.q, m_begin, queries, shared.resident, first, head.k, n_begin, keys, shared.streamed, s);
    first = false;
    __syncthreads();  // the last readers of shared.scores are done, with no columns at all, too
    compute_gradients<C, false, Gradient::kOfProducts>(p, head, t, shared, s, dp, slope_sum);
    const uint8_t* alive = head.rules.masked ? shared.alive[0] : nullptr;
    store_scores<C>(shared.scores, dp);  // each thread overwrites what it alone has read of the mask
    if (alive != nullptr || p.head_dim > C::kWidth) {
      load_tile<C>(shared.streamed, head.k, n_begin, part, keys, alive);
    }
    __syncthreads();  // dS and k are there
    add_product<C>(shared.scores, shared.streamed, dq);
  }
  if (params.dq.data != nullptr) {
    const auto to = head_matrix<T>(params.dq, b, sequence.q_row, h, p.head_dim, arguments.dq_quads);
    store_product<C>(to, m_begin, part, queries.end, dq, [&](int) { return Acc(p.softmax_scale); });
  }
  if constexpr (kExtended) {
    if (arguments.rows.slope_sum == nullptr || part != 0) return;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
      Acc sum = slope_sum[i];
#pragma unroll
      for (int lane = 1; lane < kThreadCols; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
      const int row = thread_row() + kThreadRows * i;
      if (thread_col() != 0 || row >= queries.end) continue;
      static_cast<Acc*>(arguments.rows.slope_sum)[head.first_row + m_begin + row] = sum;
    }
  }
}

template <typename T>
BackwardArguments backward_arguments(const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  const auto quads = [](const TensorView& view, int64_t columns) { return is_quad_aligned(view, columns, sizeof(T)); };
  BackwardArguments a{};
  a.params = params;
  a.rows = RowWorkspace::in(params);
  a.num_parts = 1;
  a.group_size = p.group_size();
  a.q_quads = quads(p.q, p.head_dim), a.k_quads = quads(p.k, p.head_dim), a.v_quads = quads(p.v, p.head_dim_v);
  a.dout_quads = quads(params.dout, p.head_dim_v), a.dq_quads = quads(params.dq, p.head_dim);
  a.dk_quads = quads(params.dk, p.head_dim), a.dv_quads = quads(params.dv, p.head_dim_v);
  return a;
}

template <typename T, int kHeadDim, bool kExtended>
void launch_backward_kernels(const BackwardParams& params, const int* flags, cudaStream_t stream) {
  using C = Config<T, kHeadDim, kExtended>;
  constexpr int kSharedBytes = int(sizeof(SharedStorage<C>));
  const ForwardParams& p = params.forward;
  BackwardArguments a = backward_arguments<T>(params);
  a.flags = flags;
  if (params.dk.data != nullptr || params.dv.data != nullptr) {
    a.blocks = SequenceBlocks::of_keys(p, C::kBlock);
    a.num_parts = ceil_div(p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v, kHeadDim);
    cuda::launch_blocks(dkdv_kernel<T, kHeadDim, kExtended>, a, a.blocks.count() * p.num_heads_k * a.num_parts,
                        kThreads, kSharedBytes, stream, "universal dk dv");
  }
  if (params.dq.data != nullptr || params.dslopes != nullptr) {
    a.blocks = SequenceBlocks::of_queries(p, C::kBlock);
    a.num_parts = params.dq.data != nullptr && p.head_dim > 0 ? ceil_div(p.head_dim, kHeadDim) : 1;
    cuda::launch_blocks(dq_kernel<T, kHeadDim, kExtended>, a, a.blocks.count() * p.num_heads * a.num_parts, kThreads,
                        kSharedBytes, stream, "universal dq");
  }
}

}  // namespace

template <typename T>
void launch_backward(const BackwardParams& params, const int* flags, cudaStream_t stream) {
  if (backward_bucket(params.forward) == 16) return launch_backward_kernels<T, 16, false>(params, flags, stream);
  const bool extended = is_extended(params.forward);
  (extended ? launch_backward_kernels<T, 64, true> : launch_backward_kernels<T, 64, false>)(params, flags, stream);
}

}  // namespace flash_attn::cuda::universal
