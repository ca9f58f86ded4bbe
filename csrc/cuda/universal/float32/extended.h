// What else makes scores: softcap, ALiBi, attn_mask, dropout. A tile's thread asks for its elements by their query and
// key; what no query sees, or what sees no key, must not meet a product, since 0 times infinity is NaN: the tile keeps
// marks of those that are alive, and rows of the others become 0 behind their arrival.
#pragma once

#include "../../common/scores/dropout_fours.h"
#include "../scores.h"
#include "slabs.h"

namespace flash_attn::cuda::universal::float32 {
namespace {

/// The rules of one head of one sequence.
struct ScoreRules {
  float scale, softcap, slope;  // 0: none
  float dropout_scale;
  bool masked, dropout;

  FLASH_ATTN_DEVICE ScoreRules(const ForwardParams& p, int64_t b, int64_t h)
      : scale(float(p.softmax_scale)),
        softcap(float(p.softcap)),
        slope(0.f),
        dropout_scale(1.f),
        masked(p.mask.data != nullptr),
        dropout(p.dropout_p > 0.0) {
    if (p.alibi_slopes != nullptr) {
      slope = static_cast<const float*>(p.alibi_slopes)[b * p.alibi_batch_stride + h * p.alibi_head_stride];
    }
    if (dropout) dropout_scale = float(make_dropout(p.rng_state, p.dropout_p).scale);
  }

  template <int kM, int kN>
  FLASH_ATTN_DEVICE static void scale_scores(float (&s)[kM][kN], float factor) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) s[i][j] *= factor;
    }
  }

  /// From q k^T to scores in natural units, attn_mask excepted. The caller is told of each tanh of the softcap.
  template <int kM, int kN, typename OfTanh>
  FLASH_ATTN_DEVICE void apply(float (&s)[kM][kN], const ScoreTile& t, const OfTanh& of_tanh,
                               bool transposed = false) const {
    scale_scores(s, softcap > 0.f ? scale / softcap : scale);
    if (softcap > 0.f) {
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const float tanh = tanhf(s[i][j]);
          of_tanh(i, j, tanh);
          s[i][j] = softcap * tanh;
        }
      }
    }
    if (slope == 0.f) return;
    const FreshPlace at;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int away = place_of(at.row, i) - place_of(at.column, j);
        s[i][j] -= slope * fabsf(float(t.offset) + float(transposed ? -away : away));
      }
    }
  }
};

/// Whether the kernels read such a mask: places in a tile are counted in 32 bits.
inline bool reads_mask(const MaskView& mask) {
  constexpr int64_t kMaxStride = 1 << 23;
  const auto fits = [](int64_t stride) { return stride > -kMaxStride && stride < kMaxStride; };
  return mask.data == nullptr ||
         ((mask.dtype == DType::kBool || mask.dtype == DType::kFloat32) && fits(mask.row) && fits(mask.col));
}

/// attn_mask from the first query and key of a tile on.
struct MaskTile {
  const void* data;
  int row, column;  // strides
  bool is_bool;

  FLASH_ATTN_DEVICE MaskTile(const MaskView& mask, int64_t b, int64_t h, const ScoreTile& t)
      : row(int(mask.row)), column(int(mask.col)), is_bool(mask.dtype == DType::kBool) {
    const int64_t origin = b * mask.batch + h * mask.head + t.m_begin * mask.row + t.n_begin * mask.col;
    data = static_cast<const char*>(mask.data) + origin * (is_bool ? 1 : 4);
  }
  /// A NaN that is masked out goes.
  FLASH_ATTN_DEVICE static float add(float s, float bias) { return bias == -INFINITY ? bias : s + bias; }
  FLASH_ATTN_DEVICE static float add(float s, uint8_t shown) { return shown != 0 ? s : -INFINITY; }
  template <typename Storage>
  FLASH_ATTN_DEVICE Storage load(int place) const {
    return __ldg(static_cast<const Storage*>(data) + place);
  }
  /// What is added to a score, which has to exist.
  FLASH_ATTN_DEVICE float operator()(int i, int j) const {
    const int place = i * row + j * column;
    if (is_bool) return load<uint8_t>(place) != 0 ? 0.f : -INFINITY;
    return load<float>(place);
  }
};

/// Whether attn_mask leaves something of the tile. All threads call it and get the same answer.
template <int kQueries, int kKeys>
FLASH_ATTN_DEVICE bool is_seen(const MaskView& mask, int64_t b, int64_t h, const ScoreTile& t) {
  const MaskTile values(mask, b, h, t);
  const auto sees = [&](int i, int j) { return t.sees(i, j) && values(i, j) != -INFINITY; };
  uint32_t thread = threadIdx.x;
  forget_derived(thread);  // nothing of it is kept throughout, as registers are few
  const int n = int(thread);
  // Mostly one of a few answers it.
  if (__syncthreads_or(sees(n % kQueries, (n / kQueries * (kKeys / 4) + n * 5) % kKeys)) != 0) return true;
  bool any = false;
#pragma unroll 4
  for (int k = n; k < kQueries * kKeys; k += kThreads) any = any || sees(k / kKeys, k % kKeys);
  return __syncthreads_or(any) != 0;
}

/// Of a tile's rows along one side, which are alive: a bit each.
template <int kCount>
struct Alive {
  uint32_t words[kCount / 32];

  /// The thread's four neighbours from `first` on, `some` a bit each.
  FLASH_ATTN_DEVICE void mark(int first, uint32_t some) {
    if (some != 0) atomicOr(&words[first / 32], some << (first % 32));
  }
  FLASH_ATTN_DEVICE bool has(int i) const { return (words[i / 32] >> (i % 32) & 1) != 0; }
  /// slab (kRowsOfSlab, kWidth): rows that are not alive, of which the first one is `first`, become 0. All threads call
  /// it behind a barrier, and read behind another.
  template <int kRowsOfSlab, int kSlabWidth>
  FLASH_ATTN_DEVICE void clear_others(float* slab, int first) const {
    bool all = true;
#pragma unroll
    for (int i = 0; i < kCount / 32; ++i) {
      const int begin = min(max(first - 32 * i, 0), 32), end = min(max(first + kRowsOfSlab - 32 * i, 0), 32);
      const uint32_t wanted = end > begin ? (~0u >> (32 - (end - begin))) << begin : 0;
      all = all && (words[i] & wanted) == wanted;
    }
    if (all) return;
    for (int n = int(threadIdx.x); n < kRowsOfSlab * kSlabWidth / 4; n += kThreads) {
      const int r = n / (kSlabWidth / 4);
      if (!has(first + r)) reinterpret_cast<float4*>(slab)[n] = float4{0.f, 0.f, 0.f, 0.f};
    }
    __syncthreads();  // the zeros are there
  }
};

/// Which scores dropout keeps: a bit each, of four keys a byte.
template <int kQueries, int kKeys>
struct Kept {
  uint8_t fours[kQueries][kKeys / 4];

  /// All threads; a barrier stands before and after.
  FLASH_ATTN_DEVICE void draw(const ForwardParams& p, int64_t batch_head, int m_begin, int n_begin) {
    draw_fours<kQueries, kKeys, kThreads>(make_dropout(p.rng_state, p.dropout_p), batch_head, m_begin, n_begin,
                                          fours[0]);
  }
  /// Of query i and four keys from j on.
  FLASH_ATTN_DEVICE uint32_t four(int i, int j) const { return fours[i][j / 4]; }
};

}  // namespace
}  // namespace flash_attn::cuda::universal::float32
