// What turns q.k into a score: scale, softcap, attn_mask, ALiBi, window, lengths, dropout. Scores stay in natural units
// until a maximum or lse is subtracted: a mask of the smallest number times log2(e) would be -inf. kTransposed tiles
// have keys as rows and queries as columns.
#pragma once

#include <type_traits>

#include "../../sequence.h"
#include "../common/scores/dropout_fours.h"
#include "tile.h"

namespace flash_attn::cuda::universal {
namespace {

template <typename Acc>
__device__ __forceinline__ Acc minus_infinity() {
  return Acc(-__builtin_huge_val());
}

__device__ __forceinline__ float exponential(float x) { return exp2f(x * 1.4426950408889634f); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }

/// A tile of one head's scores: queries [m_begin, m_begin + kQueries), keys [n_begin, n_begin + kKeys). Query i of it
/// sees key j when i < queries, j < keys and low <= j - i <= high.
struct ScoreTile {
  int64_t m_begin, n_begin;
  int64_t offset;  // where query 0 of the tile stands, as a key of the tile
  int queries, keys, low, high;
  bool partial;  // some score does not exist

  __device__ __forceinline__ bool sees(int i, int j) const {
    return i < queries && j < keys && j - i >= low && j - i <= high;
  }
};

template <int kQueries, int kKeys = kQueries>
__device__ __forceinline__ ScoreTile score_tile(const ForwardParams& p, const SequenceInfo& sequence, int64_t m_begin,
                                                int64_t n_begin) {
  constexpr int64_t kFar = kQueries + kKeys;
  ScoreTile t;
  t.m_begin = m_begin, t.n_begin = n_begin;
  t.queries = int(clamp<int64_t>(sequence.seqlen_q - m_begin, 0, kQueries));
  t.keys = int(clamp<int64_t>(sequence.seqlen_k - n_begin, 0, kKeys));
  t.offset = m_begin + sequence.diagonal - n_begin;
  t.low = p.window_left < 0 ? -int(kFar) : int(clamp<int64_t>(t.offset - p.window_left, -kFar, kFar));
  t.high = p.window_right < 0 ? int(kFar) : int(clamp<int64_t>(t.offset + p.window_right, -kFar, kFar));
  t.partial = t.queries < kQueries || t.keys < kKeys || t.low > 1 - kQueries || t.high < kKeys - 1;
  return t;
}

/// The rules for head h of sequence b.
template <typename C>
struct ScoreRules {
  using Acc = typename C::Acc;
  Acc scale;
  Acc softcap, slope;  // 0: none
  Acc dropout_scale;
  bool masked, dropout;

  __device__ __forceinline__ ScoreRules(const ForwardParams& p, int64_t b, int64_t h)
      : scale(Acc(p.softmax_scale)),
        softcap(Acc(p.softcap)),
        slope(0),
        dropout_scale(1),
        masked(p.mask.data != nullptr),
        dropout(p.dropout_p > 0.0) {
    if constexpr (C::kExtended) {
      if (p.alibi_slopes != nullptr) {
        slope = static_cast<const Acc*>(p.alibi_slopes)[b * p.alibi_batch_stride + h * p.alibi_head_stride];
      }
      if (dropout) dropout_scale = Acc(make_dropout(p.rng_state, p.dropout_p).scale);
    }
  }

  __device__ __forceinline__ Acc distance(const ScoreTile& t, int i, int j) const {
    const Acc x = Acc(t.offset) + Acc(i - j);
    return x < Acc(0) ? -x : x;
  }

  /// From q.k to the score of query i and key j; `bias` is attn_mask's. `tanh` gets the softcap's if there is one.
  __device__ __forceinline__ Acc score(const ScoreTile& t, int i, int j, Acc product, const Acc* bias,
                                       Acc& tanh) const {
    Acc s = product * scale;
    if constexpr (C::kExtended) {
      if (softcap > Acc(0)) {
        tanh = hyperbolic_tangent(s / softcap);
        s = softcap * tanh;
      }
      if (slope != Acc(0)) s -= slope * distance(t, i, j);
      // Not a sum alone: a NaN that is masked out must go.
      if (masked) s = *bias == minus_infinity<Acc>() ? *bias : s + *bias;
    }
    if (t.partial && !t.sees(i, j)) s = minus_infinity<Acc>();
    return s;
  }
};

template <typename Acc, typename Storage>
__device__ __forceinline__ Acc bias_of(Storage x) {
  if constexpr (sizeof(Storage) == 1) {
    return x != 0 ? Acc(0) : minus_infinity<Acc>();
  } else {
    return Acc(to_acc(x));
  }
}

template <typename C, typename Storage>
__device__ __forceinline__ bool sees_any_as(const MaskView& mask, int64_t origin, const ScoreTile& t) {
  using Acc = typename C::Acc;
  const Storage* data = static_cast<const Storage*>(mask.data) + origin;
  bool any = false;
#pragma unroll 2
  for (int n = int(threadIdx.x); n < C::kBlock * C::kBlock; n += kThreads) {
    const int i = n / C::kBlock, j = n % C::kBlock;
    any = any || (t.sees(i, j) && bias_of<Acc>(data[i * mask.row + j * mask.col]) != minus_infinity<Acc>());
  }
  return any;
}

/// Calls f with a null pointer to the mask's type.
template <typename F>
__device__ __forceinline__ auto with_mask_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBool: return f(static_cast<const uint8_t*>(nullptr));
    case DType::kFloat64: return f(static_cast<const double*>(nullptr));
    case DType::kFloat32: return f(static_cast<const float*>(nullptr));
    case DType::kBFloat16: return f(static_cast<const __nv_bfloat16*>(nullptr));
    default: return f(static_cast<const __half*>(nullptr));
  }
}

/// Whether attn_mask takes every score of the tile away, which is then passed over. All threads call it and get the
/// same answer. A tile that stays has its mask read again, from the cache.
template <typename C>
__device__ __forceinline__ bool is_masked_out(const ForwardParams& p, int64_t b, int64_t h, const ScoreTile& t) {
  if constexpr (C::kExtended) {
    const MaskView& mask = p.mask;
    if (mask.data == nullptr) return false;
    const int64_t origin = b * mask.batch + h * mask.head + t.m_begin * mask.row + t.n_begin * mask.col;
    const bool any = with_mask_type(mask.dtype, [&](auto* type) {
      return sees_any_as<C, std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(mask, origin, t);
    });
    return __syncthreads_or(any) == 0;
  }
  return false;
}

template <typename C, bool kTransposed, int kUnroll, typename Storage>
__device__ __forceinline__ void load_mask_as(const MaskView& mask, int64_t origin, const ScoreTile& t,
                                             typename C::Acc* bias) {
  const Storage* data = static_cast<const Storage*>(mask.data) + origin;
#pragma unroll(kUnroll)
  for (int n = int(threadIdx.x); n < C::kBlock * C::kBlock; n += kThreads) {
    const int i = n / C::kBlock, j = n % C::kBlock;
    bias[kTransposed ? j * C::kLdP + i : i * C::kLdP + j] =
        t.sees(i, j) ? bias_of<typename C::Acc>(data[i * mask.row + j * mask.col]) : minus_infinity<typename C::Acc>();
  }
}

/// bias (kBlock, kBlock): attn_mask of the tile; a bool becomes 0 or -inf, and so does a score that does not exist.
/// Also marks in `alive` the columns that some row sees. All threads call it; a barrier stands before, inside and
/// after.
template <typename C, bool kTransposed, int kUnroll = 1>
__device__ __forceinline__ void load_mask(const MaskView& mask, int64_t b, int64_t h, const ScoreTile& t,
                                          SharedStorage<C>& shared) {
  using Acc = typename C::Acc;
  const int64_t origin = b * mask.batch + h * mask.head + t.m_begin * mask.row + t.n_begin * mask.col;
  __syncthreads();  // the last readers of shared.scores and shared.alive are done
  with_mask_type(mask.dtype, [&](auto* type) {
    using Storage = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    load_mask_as<C, kTransposed, kUnroll, Storage>(mask, origin, t, shared.scores);
  });
  __syncthreads();  // the tile is there
  if (threadIdx.x < 2 * C::kBlock) {
    const int column = int(threadIdx.x) % C::kBlock, half = int(threadIdx.x) / C::kBlock;
    bool alive = false;
    for (int r = half * C::kBlock / 2; r < (half + 1) * C::kBlock / 2; ++r) {
      alive = alive || shared.scores[r * C::kLdP + column] != minus_infinity<Acc>();
    }
    shared.alive[half][column] = alive ? 1 : 0;
  }
  __syncthreads();  // the marks are there
}

/// keep (query, key / 4): which scores dropout keeps. All threads call it; a barrier stands before and after.
template <int kBlock>
__device__ __forceinline__ void draw_dropout(const ForwardParams& p, int64_t batch_head, const ScoreTile& t,
                                             uint8_t* keep) {
  const Dropout dropout = make_dropout(p.rng_state, p.dropout_p);
  __syncthreads();  // the last readers of keep are done
  draw_fours<kBlock, kBlock, kThreads>(dropout, batch_head, t.m_begin, t.n_begin, keep);
  __syncthreads();  // the bits are there
}

template <typename C>
__device__ __forceinline__ bool is_kept(const SharedStorage<C>& shared, int i, int j) {
  return ((shared.keep[i * (C::kBlock / 4) + j / 4] >> (j % 4)) & 1) != 0;
}

}  // namespace
}  // namespace flash_attn::cuda::universal
