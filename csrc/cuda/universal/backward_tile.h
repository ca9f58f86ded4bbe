// What the three kernels of the backward pass have in common: a tile's P and dS from its operands.
#pragma once

#include "../common/launch.h"
#include "../common/tiles/sequence_blocks.h"
#include "backward_launch.h"
#include "rows.h"
#include "scores.h"

namespace flash_attn::cuda::universal {
namespace {

struct BackwardArguments {
  BackwardParams params;
  RowWorkspace rows;
  SequenceBlocks blocks;                       // of the rows that the kernel's blocks own
  int64_t first_block, num_parts, group_size;  // parts: of head_dim and head_dim_v
  const int* flags;                            // see launch_forward()
  int64_t mask_row_blocks;                     // of the gradient of attn_mask: the mask's own
  bool q_quads, k_quads, v_quads, dout_quads, dq_quads, dk_quads, dv_quads;
};

/// Whether the universal kernels are to compute this (batch, KV head).
__device__ __forceinline__ bool is_wanted(const BackwardArguments& a, int64_t b, int64_t h_k) {
  return a.flags == nullptr || a.flags[b * a.params.forward.num_heads_k + h_k] != 0;
}

/// One query head of one sequence, and the key head that it reads.
template <typename C>
struct BackwardHead {
  using T = typename C::Element;
  SequenceInfo sequence;
  int64_t b;
  int h;
  Matrix<T> q, k, v, dout;
  ScoreRules<C> rules;
  int64_t first_row;  // in RowWorkspace

  __device__ __forceinline__ BackwardHead(const BackwardArguments& a, const SequenceInfo& s, int64_t b, int h)
      : sequence(s), b(b), h(h), rules(a.params.forward, b, h) {
    const ForwardParams& p = a.params.forward;
    const int h_k = h / int(a.group_size);
    q = head_matrix<T>(p.q, b, s.q_row, h, p.head_dim, a.q_quads);
    k = head_matrix<T>(p.k, b, s.k_row, h_k, p.head_dim, a.k_quads);
    v = head_matrix<T>(p.v, b, s.k_row, h_k, p.head_dim_v, a.v_quads);
    dout = head_matrix<T>(a.params.dout, b, s.q_row, h, p.head_dim_v, a.dout_quads);
    first_row = int64_t(h) * p.total_q + (p.cu_seqlens_q != nullptr ? s.q_row : b * p.seqlen_q);
  }
};

/// shared.lse, shared.lost and shared.delta of the tile's queries. A barrier has to stand before and after.
template <typename C>
__device__ __forceinline__ void load_statistics(const BackwardArguments& a, int64_t first_row, const ScoreTile& t,
                                                SharedStorage<C>& shared) {
  using Acc = typename C::Acc;
  const int i = int(threadIdx.x);
  if (i >= C::kBlock) return;
  const int64_t row = first_row + t.m_begin + i;
  shared.lse[i] = i < t.queries ? static_cast<const Acc*>(a.rows.lse)[row] : Acc(0);
  shared.lost[i] = i < t.queries ? static_cast<const Acc*>(a.rows.lost)[row] : Acc(0);
  shared.delta[i] = i < t.queries ? static_cast<const Acc*>(a.rows.delta)[row] : Acc(0);
}

/// s += rows columns^T over the whole of both matrices' columns. A single chunk of `rows` is
/// loaded only with load_rows: it stays in row_tile if nobody else uses that.
template <typename C>
__device__ __forceinline__ void multiply(const Matrix<typename C::Element>& rows, int64_t row, RowRange row_range,
                                         typename C::Acc* row_tile, bool load_rows,
                                         const Matrix<typename C::Element>& columns, int64_t column,
                                         RowRange column_range, typename C::Acc* column_tile,
                                         typename C::Acc (&s)[C::kRows][C::kCols]) {
  clear(s);
#pragma unroll 1
  for (int64_t chunk = 0; chunk < rows.columns; chunk += C::kWidth) {
    __syncthreads();  // the last readers of both tiles are done
    if (load_rows || rows.columns > C::kWidth) load_tile<C>(row_tile, rows, row, chunk, row_range);
    load_tile<C>(column_tile, columns, column, chunk, column_range);
    __syncthreads();  // both tiles are there
    add_scores<C>(row_tile, column_tile, rows.columns - chunk, s);
  }
}

/// What compute_gradients returns in dp.
enum class Gradient { kOfScores, kOfProducts };  // dS, or dS times the softcap's derivative

/// From products s = q k^T and dp = dout v^T of a tile to s = P after dropout and dp = dS. slope_sum += dS * distance
/// where rows are queries. The tile's statistics have to be in shared.
template <typename C, bool kTransposed, Gradient kGradient>
__device__ __forceinline__ void compute_gradients(const ForwardParams& p, const BackwardHead<C>& head,
                                                  const ScoreTile& t, SharedStorage<C>& shared,
                                                  typename C::Acc (&s)[C::kRows][C::kCols],
                                                  typename C::Acc (&dp)[C::kRows][C::kCols],
                                                  typename C::Acc (&slope_sum)[C::kRows]) {
  using Acc = typename C::Acc;
  const ScoreRules<C>& rules = head.rules;
  if constexpr (C::kExtended) {
    if (rules.masked) load_mask<C, kTransposed>(p.mask, head.b, head.h, t, shared);
    if (rules.dropout) draw_dropout<C::kBlock>(p, head.b * p.num_heads + head.h, t, shared.keep);
  }
#pragma unroll
  for (int r = 0; r < C::kRows; ++r) {
    if constexpr (C::kExtended) __syncwarp();  // keeps the compiler from reading the mask of all rows at once
#pragma unroll
    for (int c = 0; c < C::kCols; ++c) {
      const int row = thread_row() + kThreadRows * r, column = thread_col() + kThreadCols * c;
      const int i = kTransposed ? column : row, j = kTransposed ? row : column;
      Acc tanh = Acc(0), exponent;  // score - lse - lost
      if constexpr (C::kExtended) {
        exponent = rules.score(t, i, j, s[r][c], shared.scores + row * C::kLdP + column, tanh) - shared.lse[i];
      } else {
        exponent =
            t.partial && !t.sees(i, j) ? minus_infinity<Acc>() : multiply_add(s[r][c], rules.scale, -shared.lse[i]);
      }
      exponent -= shared.lost[i];
      // Above 0 by rounding alone, which of very large scores is enough for an infinity.
      const Acc probability = exponential(exponent > Acc(0) ? -exponent : exponent);
      Acc kept = Acc(1);
      if constexpr (C::kExtended) {
        if (rules.dropout) kept = is_kept(shared, i, j) ? rules.dropout_scale : Acc(0);
      }
      const bool exists = exponent != minus_infinity<Acc>();
      s[r][c] = exists && kept != Acc(0) ? probability * kept : Acc(0);
      const Acc dp_kept = kept != Acc(0) ? dp[r][c] * kept : Acc(0);
      Acc ds = exists ? probability * (dp_kept - shared.delta[i]) : Acc(0);
      if constexpr (C::kExtended) {
        if (!kTransposed && exists) slope_sum[r] += ds * rules.distance(t, i, j);
        if (kGradient == Gradient::kOfProducts && exists) ds *= Acc(1) - tanh * tanh;
      }
      dp[r][c] = ds;
    }
  }
}

}  // namespace
}  // namespace flash_attn::cuda::universal
