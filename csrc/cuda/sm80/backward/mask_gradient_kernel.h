// Gradient of attn_mask: dS, summed over the dimensions along which the mask is broadcast. A block owns a tile of the
// mask and walks over every tile of scores that it was added to, in a fixed order: S^T and dP^T are computed anew, and
// no buffer of the size of the scores is needed. Several blocks of an SM hide each other's loads.
#pragma once

#include "../products.h"
#include "../tile_copy.h"
#include "config.h"
#include "gradients.h"

namespace flash_attn::cuda::sm80 {

/// Of one dimension that the mask may be broadcast along: all of it, or the block's own index.
struct MaskWalk {
  int begin, end;
  SM80_DEVICE MaskWalk(bool all, int own, int64_t size) : begin(all ? 0 : own), end(all ? int(size) : own + 1) {}
};

template <typename Config>
struct MaskGradientBlock {
  using Element = typename Config::Element;
  using Tile = SharedTile<Config::kHeadDim>;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  static constexpr int kKeyTiles = Config::kKeyTiles, kQueryTiles = Config::kQueryTiles;
  using Gradients = GradientRules<Config>;
  using Scores = typename Gradients::Scores;
  static_assert(kBlockM * kBlockN * 4 <= 2 * Config::kScoreBytes && Config::kWarpsQ > 1);

  const BackwardKernelParams& params;
  const ForwardParams& p;
  BackwardTile& tile;
  const uint32_t shared;
  int turn = 0;  // tiles of scores so far
  Scores sum;

  // See fresh_thread().
  SM80_DEVICE int lane() const { return int(fresh_thread(turn) % 32); }
  SM80_DEVICE int warp_key() const { return int(fresh_thread(turn) / (32 * Config::kWarpsQ)) * Config::kWarpKeys; }
  SM80_DEVICE int warp_query() const { return int(fresh_thread(turn) / 32 % Config::kWarpsQ) * Config::kWarpQueries; }

  SM80_DEVICE MaskGradientBlock(const BackwardKernelParams& kernel_params, BackwardTile& t, uint32_t shared_memory)
      : params(kernel_params), p(kernel_params.problem.forward), tile(t), shared(shared_memory) {
    clear(sum);
  }

  template <int kRows>
  SM80_DEVICE void load(uint32_t to, const TensorView& view, bool packed, int64_t sequence_row, int first, int64_t end,
                        int head, int64_t columns) const {
    const Element* source =
        static_cast<const Element*>(view.data) + row_offset(view, packed, tile.batch, sequence_row + first, head);
    int64_t row_stride = view.row;
    asm volatile("" : "+l"(row_stride));  // its multiples are not worth registers across the walk
    const int rows = int(end) - first;
    load_tile<kRows, Config::kHeadDim, Config::kThreads, true>(threadIdx.x, shared + to, source, row_stride,
                                                               int(columns), params.aligned, rows >= kRows,
                                                               [=](int row) { return row < rows; });
  }

  SM80_DEVICE void load_all(int head, int m_begin) const {
    const SequenceInfo& s = tile.sequence;
    const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = p.cu_seqlens_k != nullptr;
    load<kBlockM>(Config::kQ, p.q, packed_q, s.q_row, m_begin, s.seqlen_q, head, p.head_dim);
    load<kBlockN>(Config::kK, p.k, packed_k, s.k_row, tile.n_begin, s.seqlen_k, tile.head_k, p.head_dim);
    load<kBlockM>(Config::kDo, params.problem.dout, packed_q, s.q_row, m_begin, s.seqlen_q, head, p.head_dim_v);
    load<kBlockN>(Config::kV, p.v, packed_k, s.k_row, tile.n_begin, s.seqlen_k, tile.head_k, p.head_dim_v);
    if (threadIdx.x < kBlockM / 2) {
      const int row = int(threadIdx.x) % (kBlockM / 4) * 4;
      const bool is_lse = threadIdx.x < kBlockM / 4, exists = m_begin + row < s.seqlen_q;
      const float* from = (is_lse ? params.minus_lse : params.minus_delta) +
                          first_m_block(params, s, tile.batch, head) * params.block_m;
      cp_async_16_or_zeros(shared + (is_lse ? Config::kLse : Config::kDelta) + 4 * row,
                           exists ? from + m_begin + row : from, exists);
    }
  }

  /// sum += dS of one tile of scores.
  SM80_DEVICE void add_scores(int head, int m_begin) {
    load_all(head, m_begin);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // the tiles are there
    const Gradients rules(params, tile);
    const int key = warp_key(), query = warp_query(), at = lane();
    const WarpPlace place{m_begin + query, key, uint32_t(at)};
    typename Gradients::Bits shown;
    typename Gradients::Kept kept;
    rules.find_shown(shown, head, place);
    rules.draw_kept(kept, head, place);
    Scores s, dp;
    const auto zero = [](int) { return float2{0.f, 0.f}; };
    multiply_rows<Element, Config::kHeadDim>(s, address_by_rows<Tile>(shared + Config::kK, key, at),
                                             address_by_columns<Tile>(shared + Config::kQ, query, at), zero);
    multiply_rows<Element, Config::kHeadDim>(dp, address_by_rows<Tile>(shared + Config::kV, key, at),
                                             address_by_columns<Tile>(shared + Config::kDo, query, at), zero);
    typename Gradients::Fragments p_t, ds_t;  // not needed
    rules.apply_extended(s, dp, shared + Config::kLse + 4 * query, shared + Config::kDelta + 4 * query, head, place,
                         shown, kept, p_t, ds_t, [&](int m, int n, int i, float ds) { sum[m][n][i] += ds; });
    __syncthreads();  // all are done with the tiles
    ++turn;
  }

  SM80_DEVICE void set_tile(int batch, int head, const SequenceInfo& sequence, int n_begin) const {
    __syncthreads();  // the last readers are done
    if (threadIdx.x == 0) {
      tile.batch = batch;
      tile.head_k = head / int(p.num_heads / p.num_heads_k);
      tile.sequence = sequence;
      tile.n_begin = n_begin;
      tile.keys = int(clamp<int64_t>(sequence.seqlen_k - n_begin, 0, kBlockN));
      set_bounds(p, tile);
      set_dropout(p, tile);
    }
    __syncthreads();  // all see the tile
  }

  /// Tiles of scores of one head of one sequence.
  SM80_DEVICE void walk_head(int batch, int head, int own_m, int own_n) {
    const SequenceInfo s = sequence_info(p, batch);
    const MaskWalk rows(p.mask.row_size == 1, own_m, (s.seqlen_q + kBlockM - 1) / kBlockM);
    const MaskWalk columns(p.mask.col_size == 1, own_n, (s.seqlen_k + kBlockN - 1) / kBlockN);
    for (int m = rows.begin; m < rows.end; ++m) {
      const int64_t m_begin = int64_t{m} * kBlockM, m_end = clamp<int64_t>(m_begin + kBlockM, 0, s.seqlen_q);
      if (m_begin >= m_end) continue;
      const Range seen = visible_columns(p, s, m_begin, m_end);
      for (int n = columns.begin; n < columns.end; ++n) {
        const int64_t n_begin = int64_t{n} * kBlockN;
        if (n_begin >= seen.end || n_begin + kBlockN <= seen.begin) continue;
        set_tile(batch, head, s, int(n_begin));
        add_scores(head, int(m_begin));
      }
    }
  }

  /// Place of a number in the tile of sums in shared memory; neighbouring pairs of rows use different banks.
  SM80_DEVICE static int place_of(int query, int key) {
    return query * kBlockN + (key ^ (query / 2 % 4 * 8 % kBlockN));
  }

  SM80_DEVICE void store(float* to, int m_begin, int n_begin) const {
    float* const sums = static_cast<float*>(__cvta_shared_to_generic(shared + Config::kDs));
    const int key = warp_key() + lane() / 4, query = warp_query() + lane() % 4 * 2;
    __syncthreads();  // all are done with shared memory
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[place_of(query + 8 * n + i % 2, key + 16 * m + i / 2 * 8)] = sum[m][n][i];
        }
    __syncthreads();  // the sums are there
    const MaskView& mask = p.mask;
    const bool all_rows = mask.row_size == 1, all_columns = mask.col_size == 1;
    const int rows = int(mask.row_size - m_begin < kBlockM ? mask.row_size - m_begin : kBlockM);
    const int columns = int(mask.col_size - n_begin < kBlockN ? mask.col_size - n_begin : kBlockN);
#pragma unroll 1
    for (int at = int(threadIdx.x); at < rows * columns; at += Config::kThreads) {
      const int i = at / columns, j = at % columns;
      float total = 0.f;
#pragma unroll 1
      for (int r = all_rows ? 0 : i; r < (all_rows ? kBlockM : i + 1); ++r) {
#pragma unroll 1
        for (int c = all_columns ? 0 : j; c < (all_columns ? kBlockN : j + 1); ++c) total += sums[place_of(r, c)];
      }
      to[(m_begin + i) * mask.col_size + n_begin + j] = total;
    }
  }

  SM80_DEVICE void run(int64_t slice, int own_m, int own_n) {
    const MaskView& mask = p.mask;
    const MaskWalk batches(mask.batch_size == 1, int(slice / mask.head_size), p.batch);
    const MaskWalk heads(mask.head_size == 1, int(slice % mask.head_size), p.num_heads);
    for (int b = batches.begin; b < batches.end; ++b) {
      for (int h = heads.begin; h < heads.end; ++h) walk_head(b, h, own_m, own_n);
    }
    store(static_cast<float*>(params.problem.dmask) + slice * mask.row_size * mask.col_size, own_m * kBlockM,
          own_n * kBlockN);
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    mask_gradient_kernel(const __grid_constant__ MaskGradientParams params) {
  if constexpr (Config::kHasCode) {
    extern __shared__ __align__(128) unsigned char dynamic[];
    const uint32_t shared = shared_address(dynamic);
    BackwardTile& tile = *static_cast<BackwardTile*>(__cvta_shared_to_generic(shared + Config::kTile));
    int64_t index = params.first_block + blockIdx.x;
    const int own_n = int(index % params.n_blocks);
    index /= params.n_blocks;
    const int own_m = int(index % params.m_blocks);
    MaskGradientBlock<Config>(params.kernel, tile, shared).run(index / params.m_blocks, own_m, own_n);
  } else {
    __trap();
  }
}

}  // namespace flash_attn::cuda::sm80
