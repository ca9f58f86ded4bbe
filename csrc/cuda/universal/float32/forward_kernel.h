// Forward in float32: a block owns 128 query rows of one head and kHeadDim columns of their output, and walks over
// tiles of 128 keys. Of each tile S = Q K^T comes in slabs of 16 columns of Q and K; P goes to shared memory one half
// of the keys after the other, where it meets slabs of V.
#pragma once

#include <new>

#include "../../common/launch.h"
#include "../../common/tiles/sequence_blocks.h"
#include "extended.h"

namespace flash_attn::cuda::universal::float32 {
namespace {

struct ForwardArguments {
  ForwardParams params;
  SequenceBlocks m_blocks;
  int64_t first_block, group_size, num_parts;  // parts: of head_dim_v
  const int* flags;                            // see float32.h
};

/// What stays the same for a block, in shared memory, as registers are few.
struct ForwardBlock {
  SequenceInfo sequence;
  int64_t batch, head, m_begin;
  Rows q, k, v;  // of the block's rows, and of all keys
  int rows, part_column;
  RowRange visible;  // keys
  ScoreRules rules;

  FLASH_ATTN_DEVICE ForwardBlock(const ForwardArguments& a, const SequenceBlocks::PlaceOfHead& at, int part_column)
      : batch(at.batch),
        head(at.head),
        m_begin(at.index * a.m_blocks.block),
        part_column(part_column),
        rules(a.params, at.batch, at.head) {
    const ForwardParams& p = a.params;
    sequence = sequence_info(p, batch);
    const int64_t head_k = head / a.group_size;
    const bool wanted = a.flags == nullptr || a.flags[batch * p.num_heads_k + head_k] != 0;
    rows = wanted && at.index >= 0 ? int(clamp<int64_t>(sequence.seqlen_q - m_begin, 0, a.m_blocks.block)) : 0;
    if (rows == 0) return;
    q = rows_of(p.q, batch, sequence.q_row + m_begin, head, p.head_dim);
    k = rows_of(p.k, batch, sequence.k_row, head_k, p.head_dim);
    v = rows_of(p.v, batch, sequence.k_row, head_k, p.head_dim_v);
    const Range seen = visible_columns(p, sequence, m_begin, m_begin + rows);
    visible = {int(seen.begin), int(seen.end)};
  }

  /// Of the tile from n_begin on those that some query of the block sees.
  FLASH_ATTN_DEVICE RowRange keys_of(int n_begin, int size) const {
    return {max(visible.begin - n_begin, 0), min(visible.end - n_begin, size)};
  }
  template <typename C>
  FLASH_ATTN_DEVICE ScoreTile tile(const ForwardParams& p, int n_begin) const {
    return score_tile<C::kQueries, C::kKeys>(p, sequence, m_begin, n_begin);
  }
  /// The first tile from n_begin on of which attn_mask leaves something.
  template <typename C>
  FLASH_ATTN_DEVICE int find_tile(const ForwardParams& p, int n_begin) const {
    if constexpr (C::kExtended) {
      if (p.mask.data == nullptr) return n_begin;
      while (n_begin < visible.end && !is_seen<C::kQueries, C::kKeys>(p.mask, batch, head, tile<C>(p, n_begin))) {
        n_begin += C::kKeys;
      }
    }
    return n_begin;
  }
};

template <int kHeadDim_, bool kExtended_>
struct ForwardConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kExtended = kExtended_;  // softcap, ALiBi, attn_mask, dropout
  static constexpr int kQueries = kGrid * kRows, kKeys = 128, kHalf = kKeys / 2;
  static constexpr int kCols = kKeys / kGrid, kOutCols = kHeadDim / kGrid;
  static constexpr int kWidth = 16;                  // columns of slabs of Q and K
  static constexpr int kLd = kQueries + 4;           // of these, transposed, and of P, whose rows are keys
  static constexpr int kSlabKeys = 2048 / kHeadDim;  // of a slab of V
  static constexpr int kStages = 3, kStageSize = 2 * kWidth * kLd;
  struct Shared {
    alignas(16) float stages[kStages][kStageSize];
    alignas(16) float p[kHalf * kLd];
    Alive<kKeys> alive[kExtended ? 2 : 1];  // of tiles in turn
    Kept<kExtended ? kQueries : 1, kKeys> kept;
    alignas(ForwardBlock) unsigned char block[sizeof(ForwardBlock)];
  };
  static_assert(sizeof(Shared) <= 99 << 10);
};

/// What a block loads, slab after slab.
template <typename C>
struct ForwardLoads {
  const ForwardBlock& block;
  int n_begin;
  int following;  // the tile after it, known in time
  int slab = 0;
  bool at_end = false;  // of the tile

  FLASH_ATTN_DEVICE void issue(float* stage) {
    if (at_end) at_end = false, slab = 0, n_begin = following;
    if (n_begin >= block.visible.end) return;
    const RowRange keys = block.keys_of(n_begin, C::kKeys);
    const int of_scores = num_slabs(block.q.columns, C::kWidth), first = (slab - of_scores) * C::kSlabKeys;
    if (first < 0) {
      const int column = slab * C::kWidth;
      load_transposed<C::kQueries, C::kWidth, C::kLd>(stage, block.q, 0, column, {0, block.rows});
      load_transposed<C::kKeys, C::kWidth, C::kLd>(stage + C::kWidth * C::kLd, block.k, n_begin, column, keys);
    } else {
      load_slab<C::kSlabKeys, C::kHeadDim>(stage, block.v, n_begin + first, block.part_column,
                                           {keys.begin - first, keys.end - first});
    }
    ++slab;
    at_end = first + C::kSlabKeys >= keys.end;
  }
};

/// Of the thread's rows; row_sum is a lane's share.
template <typename C>
struct OnlineSoftmax {
  float row_max[kRows], row_sum[kRows];
  float o[kRows][C::kOutCols];

  FLASH_ATTN_DEVICE OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) row_max[i] = -INFINITY, row_sum[i] = 0.f;
    clear(o);
  }

  /// Scores become probabilities relative to the new maximum; what was summed up follows it.
  FLASH_ATTN_DEVICE void update(float (&s)[kRows][C::kCols]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float high = row_max[i];
#pragma unroll
      for (int j = 0; j < C::kCols; ++j) high = max(high, s[i][j]);
#pragma unroll
      for (int lane = 2; lane < 32; lane *= 2) high = max(high, __shfl_xor_sync(~0u, high, lane));
      const float base = high == -INFINITY ? 0.f : high;
      const float shrink = natural_exp(row_max[i] - base);
      row_max[i] = high;
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < C::kCols; ++j) sum += s[i][j] = natural_exp(s[i][j] - base);
      row_sum[i] = row_sum[i] * shrink + sum;
#pragma unroll
      for (int c = 0; c < C::kOutCols; ++c) o[i][c] *= shrink;
    }
  }

  /// The row's lse; row_sum becomes what its output is to be multiplied by.
  FLASH_ATTN_DEVICE float finish(int i, float sink) {
    float sum = row_sum[i];
#pragma unroll
    for (int lane = 2; lane < 32; lane *= 2) sum += __shfl_xor_sync(~0u, sum, lane);
    const float high = max(row_max[i], sink);
    const float base = high == -INFINITY ? 0.f : high;
    const float shrink = natural_exp(row_max[i] - base);
    sum = sum * shrink + natural_exp(sink - base);
    row_sum[i] = sum == 0.f ? 0.f : shrink / sum;
    return sum == 0.f ? -INFINITY : base + logarithm(sum);
  }
};

/// Scores that do not exist become -inf.
template <typename C>
FLASH_ATTN_DEVICE void hide(float (&s)[kRows][C::kCols], const ScoreTile& t) {
  const FreshPlace at;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < C::kCols; ++j) {
      if (!t.sees(place_of(at.row, i), place_of(at.column, j))) s[i][j] = -INFINITY;
    }
  }
}

/// p (kHalf, kQueries) = the columns of `half`.
template <typename C>
FLASH_ATTN_DEVICE void store_half(float* p, const float (&s)[kRows][C::kCols], int half) {
#pragma unroll
  for (int j = 0; j < C::kCols / 2; ++j) {
    const int of_half = half * (C::kCols / 2) + j;
#pragma unroll
    for (int i = 0; i < kRows; i += 4) {
      *reinterpret_cast<float4*>(p + place_of(grid_column(), j) * C::kLd + place_of(grid_row(), i)) =
          float4{s[i][of_half], s[i + 1][of_half], s[i + 2][of_half], s[i + 3][of_half]};
    }
  }
}

template <typename C, typename Storage>
FLASH_ATTN_DEVICE void add_mask_as(float (&s)[kRows][C::kCols], const MaskTile& mask, const ScoreTile& t) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const FreshPlace at;
    const int row = min(place_of(at.row, i), t.queries - 1) * mask.row;
#pragma unroll
    for (int j = 0; j < C::kCols; ++j) {
      const Storage value = mask.load<Storage>(row + min(place_of(at.column, j), t.keys - 1) * mask.column);
      s[i][j] = MaskTile::add(s[i][j], value);
    }
    __syncwarp();  // keeps the compiler from reading the mask of all rows at once
  }
}
template <typename C>
FLASH_ATTN_DEVICE void add_mask(float (&s)[kRows][C::kCols], const MaskTile& mask, const ScoreTile& t) {
  if (mask.is_bool) {
    add_mask_as<C, uint8_t>(s, mask, t);
  } else {
    add_mask_as<C, float>(s, mask, t);
  }
}

/// Keys that some query sees.
template <typename C>
FLASH_ATTN_DEVICE void mark_keys(const float (&s)[kRows][C::kCols], Alive<C::kKeys>& alive) {
#pragma unroll
  for (int first = 0; first < C::kCols; first += 4) {
    uint32_t some = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      bool any = false;
#pragma unroll
      for (int i = 0; i < kRows; ++i) any = any || s[i][first + j] != -INFINITY;
      some |= uint32_t{any} << j;
    }
    alive.mark(place_of(grid_column(), first), some);
  }
}

/// 0 where dropout takes a probability.
template <typename C>
FLASH_ATTN_DEVICE void drop(float (&s)[kRows][C::kCols], const Kept<C::kQueries, C::kKeys>& kept) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const FreshPlace at;
#pragma unroll
    for (int j = 0; j < C::kCols; ++j) {
      const uint32_t bits = kept.four(place_of(at.row, i), place_of(at.column, j / 4 * 4));
      if ((bits >> j % 4 & 1) == 0) s[i][j] = 0.f;
    }
  }
}

template <int kHeadDim, bool kExtended>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  using C = ForwardConfig<kHeadDim, kExtended>;
  const ForwardParams& p = arguments.params;
  extern __shared__ __align__(16) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename C::Shared*>(bytes);
  const ForwardBlock& block = *reinterpret_cast<ForwardBlock*>(shared.block);
  if (threadIdx.x == 0) {
    const int64_t index = arguments.first_block + blockIdx.x;
    const auto at = arguments.m_blocks.find_of_heads(index / arguments.num_parts, p.num_heads, /*descending=*/true);
    new (shared.block) ForwardBlock(arguments, at, int(index % arguments.num_parts) * kHeadDim);
  }
  __syncthreads();  // the block is there
  if (block.rows == 0) return;
  const ScoreRules& rules = block.rules;
  OnlineSoftmax<C> softmax;
  const int n_first = block.find_tile<C>(p, block.visible.begin / C::kKeys * C::kKeys);
  ForwardLoads<C> loads{block, n_first, n_first};
  const auto issue = [&](float* stage) { loads.issue(stage); };
  Ring<C::kStages, C::kStageSize> ring{shared.stages[0]};
  ring.start(issue);
  int turn = 0;
  for (int n_begin = n_first; n_begin < block.visible.end; n_begin = loads.following, turn ^= 1) {
    loads.following = block.find_tile<C>(p, n_begin + C::kKeys);
    auto& alive = shared.alive[kExtended ? turn : 0];
    if constexpr (kExtended) {
      if (threadIdx.x < C::kKeys / 32) alive.words[threadIdx.x] = rules.masked ? 0 : ~0u;
      if (rules.dropout) shared.kept.draw(p, block.batch * p.num_heads + block.head, int(block.m_begin), n_begin);
    }
    float s[kRows][C::kCols];
    clear(s);
    for (int slabs = num_slabs(block.q.columns, C::kWidth); slabs > 0; --slabs) {
      const float* const stage = ring.next(issue);
      add_outer<C::kWidth, C::kLd, C::kLd>(stage, stage + C::kWidth * C::kLd, s);
    }
    const ScoreTile t = block.tile<C>(p, n_begin);
    if constexpr (kExtended) {
      rules.apply(s, t, [](int, int, float) {});
      if (rules.masked) add_mask<C>(s, MaskTile(p.mask, block.batch, block.head, t), t);
    } else {
      rules.scale_scores(s, rules.scale);
    }
    if (t.partial) hide<C>(s, t);
    if constexpr (kExtended) {
      if (rules.masked) mark_keys<C>(s, alive);
    }
    softmax.update(s);
    if constexpr (kExtended) {
      if (rules.dropout) drop<C>(s, shared.kept);
    }
    const int keys_end = block.keys_of(n_begin, C::kKeys).end;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1) __syncthreads();  // all are done with the first half; with the last tile they are since the scores
      store_half<C>(shared.p, s, half);
      for (int key = 0; key < C::kHalf && half * C::kHalf + key < keys_end; key += C::kSlabKeys) {
        float* const stage = ring.next(issue);  // P is there, too
        if constexpr (kExtended) {
          alive.template clear_others<C::kSlabKeys, kHeadDim>(stage, half * C::kHalf + key);
        }
        add_outer<C::kSlabKeys, C::kLd, kHeadDim>(shared.p + key * C::kLd, stage, softmax.o);
      }
    }
  }

  const float sink = p.sinks != nullptr ? static_cast<const float*>(p.sinks)[block.head] : -INFINITY;
  const int64_t first_row = block.sequence.q_row + block.m_begin;
  const int column = block.part_column + grid_column() * 4;
  float* const lse =
      static_cast<float*>(p.lse.data) + block.batch * p.lse.batch + block.head * p.lse.head + first_row * p.lse.row;
  float* const out = static_cast<float*>(p.out.data) + block.batch * p.out.batch + block.head * p.out.head +
                     first_row * p.out.row + column;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = place_of(grid_row(), i);
    const float value = softmax.finish(i, sink);
    if (row >= block.rows) continue;
    if (column == 0) lse[row * p.lse.row] = value;
#pragma unroll
    for (int g = 0; g < C::kOutCols / 4; ++g) {
      if (column + 64 * g >= p.head_dim_v) continue;
      const float f = softmax.row_sum[i] * rules.dropout_scale;
      const float* const o = softmax.o[i] + 4 * g;
      *reinterpret_cast<float4*>(out + row * p.out.row + 64 * g) = float4{o[0] * f, o[1] * f, o[2] * f, o[3] * f};
    }
  }
}

template <int kHeadDim, bool kExtended>
void launch_forward_kernel(const ForwardParams& p, const int* flags, cudaStream_t stream) {
  using C = ForwardConfig<kHeadDim, kExtended>;
  const int64_t num_parts = ceil_div(p.head_dim_v, kHeadDim);
  const ForwardArguments arguments{p, SequenceBlocks::of_queries(p, C::kQueries), 0, p.group_size(), num_parts, flags};
  cuda::launch_blocks(forward_kernel<kHeadDim, kExtended>, arguments,
                      arguments.m_blocks.count() * p.num_heads * num_parts, kThreads, int(sizeof(typename C::Shared)),
                      stream, "universal float32 forward");
}

}  // namespace
}  // namespace flash_attn::cuda::universal::float32
