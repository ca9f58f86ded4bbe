// Backward in float32, five products in one kernel: a block owns 128 key rows of one key head and kHeadDim columns of
// the gradients, and walks over tiles of 64 query rows, of every query head of the group. Of each tile
//   S^T = K Q^T, P to shared memory, dV += P^T dO, dP^T = V dO^T, dS over P, dK += dS^T Q, dQ += dS K in memory.
// What is not wanted is left out.
#pragma once

#include <new>

#include "../../common/launch.h"
#include "backward_scores.h"

namespace flash_attn::cuda::universal::float32 {
namespace {

/// dq, of a tile's row 0, += sums * scale.
template <int kHeadDim>
FLASH_ATTN_DEVICE void add_to_dq(float* dq, int64_t stride, int rows, int columns, const LowGrid<kHeadDim>& at,
                                 const float (&sums)[kRows][4], float scale) {
  if (4 * at.column >= columns) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = at.row + 8 * i;
    if (row >= rows) continue;
    float* const to = dq + row * stride + 4 * at.column;
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(sums[i][0] * scale),
                 "f"(sums[i][1] * scale), "f"(sums[i][2] * scale), "f"(sums[i][3] * scale)
                 : "memory");
#else
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to + u), "f"(sums[i][u] * scale) : "memory");
    }
#endif
  }
}

/// The block's part of dk or dv = sums * factor.
template <int kColumns>
FLASH_ATTN_DEVICE void store_sums(const TensorView& view, const BackwardBlock& block, int columns,
                                  const float (&sums)[kRows][kColumns], float factor) {
  const int column = block.part_column + grid_column() * 4;
  float* const to = static_cast<float*>(view.data) + block.batch * view.batch +
                    (block.sequence.k_row + block.n_begin) * view.row + block.head_k * view.head + column;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int r = place_of(grid_row(), i);
    if (r >= block.keys) continue;
#pragma unroll
    for (int g = 0; g < kColumns / 4; ++g) {
      if (column + 64 * g >= columns) continue;
      const float* const x = sums[i] + 4 * g;
      *reinterpret_cast<float4*>(to + r * view.row + 64 * g) =
          float4{x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor};
    }
  }
}

template <int kHeadDim, Rules kRules>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ BackwardArguments arguments) {
  using C = BackwardConfig<kHeadDim, kRules>;
  constexpr bool kExtended = C::kExtended;
  const BackwardParams& params = arguments.params;
  const ForwardParams& p = params.forward;
  extern __shared__ __align__(16) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename C::Shared*>(bytes);
  const BackwardBlock& block = *reinterpret_cast<BackwardBlock*>(shared.block);
  if (threadIdx.x == 0) {
    const int64_t index = arguments.first_block + blockIdx.x;
    const auto at = arguments.blocks.find_of_heads(index / arguments.num_parts, p.num_heads_k, /*descending=*/false);
    new (shared.block) BackwardBlock(arguments, at, int(index % arguments.num_parts) * kHeadDim);
  }
  __syncthreads();  // the block is there
  if (block.keys == 0) return;
  const Place first = block.find_tile<kExtended>(p, {block.h_begin, block.first_query});
  BackwardLoads<C> loads(arguments, block, first);
  const auto issue = [&](float* stage) { loads.issue(stage, shared.statistics); };
  const auto wants = [&](Phase phase) { return (block.phases >> phase & 1) != 0; };
  float dk[kRows][C::kOutCols], dv[kRows][C::kOutCols];
  clear(dk), clear(dv);
  Ring<C::kStages, C::kStageSize> ring{shared.stages[0]};
  ring.start(issue);
  int turn = 0;
  for (Place tile = first; tile.head < block.h_end; tile = loads.following, turn ^= 1) {
    const int m_begin = tile.m_begin;
    loads.following = block.find_tile<kExtended>(p, block.after(tile));
    const auto& statistics = shared.statistics[turn];
    auto& alive_keys = shared.alive_keys[kExtended ? turn : 0];
    auto& alive_queries = shared.alive_queries[kExtended ? turn : 0];
    const ScoreTile t = block.tile(p, m_begin);
    if constexpr (kExtended) {
      if (threadIdx.x < kKeys / 32) alive_keys.words[threadIdx.x] = p.mask.data != nullptr ? 0 : ~0u;
      if (threadIdx.x < kQueries / 32) alive_queries.words[threadIdx.x] = p.mask.data != nullptr ? 0 : ~0u;
      if constexpr (kRules == kAllRules) {
        if (p.dropout_p > 0.0) {
          shared.kept.draw(p, block.batch * p.num_heads + tile.head, m_begin, block.n_begin);
        }
      }
    }
    const auto add_rows = [&](Phase phase, float (&s)[kRows][C::kCols]) {
      clear(s);
      for (int i = C::slabs_of(p, block, phase, m_begin); i > 0; --i) {
        const float* const slab = ring.next(issue);
        add_outer<C::kWidth, C::kLd, C::kLdQueries>(slab, slab + C::kWidth * C::kLd, s);
      }
    };
    const auto add_columns = [&](Phase phase, float (&sums)[kRows][C::kOutCols]) {
      const int slabs = C::slabs_of(p, block, phase, m_begin);
      for (int i = 0; i < slabs; ++i) {
        float* const slab = ring.next(issue);  // P or dS is there, too
        if constexpr (kExtended) {
          alive_queries.template clear_others<C::kSlabRows, kHeadDim>(slab, i * C::kSlabRows);
        }
        add_outer<C::kSlabRows, C::kLd, kHeadDim>(shared.scores + i * C::kSlabRows * C::kLd, slab, sums);
      }
    };
    [[maybe_unused]] Factors factors;
    {
      float s[kRows][C::kCols];
      add_rows(kScores, s);  // all are done with the last tile's dS; marks and bits of dropout are ready
      if constexpr (kExtended) {
        store_extended<C>(shared.scores, s, factors, ScoreRules(p, block.batch, tile.head),
                          MaskTile(p.mask, block.batch, tile.head, t), t, statistics, shared.kept, alive_keys,
                          alive_queries);
      } else {
        store_probabilities<C>(shared.scores, s, t, float(p.softmax_scale), statistics);
      }
    }
    if (wants(kOfValues)) add_columns(kOfValues, dv);
    if (!wants(kOfProbabilities)) continue;
    {
      float dp[kRows][C::kCols];
      add_rows(kOfProbabilities, dp);  // all are done with P, of which each changes what it has stored itself
      if constexpr (kRules == kAllRules) {
        store_extended_gradients<C>(shared.scores, dp, factors, ScoreRules(p, block.batch, tile.head), statistics,
                                    shared.kept);
      } else {
        store_gradients<C>(shared.scores, dp, statistics);
      }
    }
    if (wants(kOfKeys)) add_columns(kOfKeys, dk);
    if (!wants(kOfQueries)) continue;
    const LowGrid<kHeadDim> at;
    float sums[kRows][4];
    clear(sums);
    const int slabs = C::slabs_of(p, block, kOfQueries, m_begin);
    for (int i = 0; i < slabs; ++i) {
      constexpr int kTerms = C::kSlabRows / LowGrid<kHeadDim>::kHalves;
      float* const slab = ring.next(issue);
      if constexpr (kExtended) alive_keys.template clear_others<C::kSlabRows, kHeadDim>(slab, i * C::kSlabRows);
      add_low<kTerms, C::kLd, kHeadDim>(at, shared.scores + i * C::kSlabRows + at.half * kTerms,
                                        slab + at.half * kTerms * kHeadDim, sums);
    }
    float* const dq = static_cast<float*>(params.dq.data) + block.batch * params.dq.batch + tile.head * params.dq.head +
                      (block.sequence.q_row + m_begin) * params.dq.row + block.part_column;
    add_to_dq<kHeadDim>(dq, params.dq.row, int(block.sequence.seqlen_q) - m_begin, int(p.head_dim) - block.part_column,
                        at, sums, float(p.softmax_scale));
  }
  if (wants(kOfKeys)) store_sums(params.dk, block, int(p.head_dim), dk, float(p.softmax_scale));
  if (wants(kOfValues)) store_sums(params.dv, block, int(p.head_dim_v), dv, 1.f);
}

/// Zeros, to which blocks add: a block writes kQueries rows of dq of one head.
__global__ void __launch_bounds__(kThreads) clear_dq_kernel(const __grid_constant__ BackwardArguments arguments) {
  const ForwardParams& p = arguments.params.forward;
  const TensorView& dq = arguments.params.dq;
  const auto [b, h, m_block] =
      arguments.blocks.find_of_heads(arguments.first_block + blockIdx.x, p.num_heads, /*descending=*/false);
  const SequenceInfo sequence = sequence_info(p, b);
  const int64_t begin = m_block * arguments.blocks.block;
  if (m_block < 0 || begin >= sequence.seqlen_q) return;
  if (arguments.flags != nullptr && arguments.flags[b * p.num_heads_k + h / arguments.group_size] == 0) return;
  const int64_t left = sequence.seqlen_q - begin;
  const int rows = int(left < arguments.blocks.block ? left : arguments.blocks.block), columns = int(p.head_dim);
  float* const data = static_cast<float*>(dq.data) + b * dq.batch + (sequence.q_row + begin) * dq.row + h * dq.head;
  for (int i = int(threadIdx.x); i < rows * columns / 4; i += kThreads) {
    const int row = i / (columns / 4), column = i % (columns / 4) * 4;
    *reinterpret_cast<float4*>(data + row * dq.row + column) = float4{0.f, 0.f, 0.f, 0.f};
  }
}

template <int kHeadDim, Rules kRules>
void launch_backward_kernel(const BackwardParams& params, bool add_dq, const int* flags, cudaStream_t stream) {
  using C = BackwardConfig<kHeadDim, kRules>;
  const ForwardParams& p = params.forward;
  const int64_t columns = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
  BackwardArguments a{params,
                      RowWorkspace::in(params),
                      SequenceBlocks::of_queries(p, kQueries),
                      0,
                      p.group_size(),
                      ceil_div(columns, kHeadDim),
                      flags,
                      add_dq};
  if (add_dq) {
    cuda::launch_blocks(clear_dq_kernel, a, a.blocks.count() * p.num_heads, kThreads, 0, stream,
                        "universal float32 dq");
  }
  a.blocks = SequenceBlocks::of_keys(p, kKeys);
  cuda::launch_blocks(backward_kernel<kHeadDim, kRules>, a, a.blocks.count() * p.num_heads_k * a.num_parts, kThreads,
                      int(sizeof(typename C::Shared)), stream, "universal float32 backward");
}

}  // namespace
}  // namespace flash_attn::cuda::universal::float32
