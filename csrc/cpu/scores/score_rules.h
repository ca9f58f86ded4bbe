// The rules that turn q.k of one head into a score, the tile of scores that they are applied to, and how the values of
// an additive attn_mask are read.
#pragma once

#include "../../packed_mask.h"
#include "../../sequence.h"
#include "../vector/tile.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

template <typename T>
constexpr T kInfinity = T(__builtin_huge_val());

/// A tile of one head's scores: query rows [m_begin, m_begin + rows), key columns [n_begin, n_begin + columns).
struct Tile {
  int64_t m_begin, rows;
  int64_t n_begin, columns;
  int64_t lane_begin, lane_end;  // rows that may see a column lie in these lanes; multiples of the vector's
  bool windowed = false;         // the window takes some score away
  bool masked = false;           // attn_mask has to be added
};

/// The rules for head h of sequence b.
template <typename T>
struct ScoreRules {
  const ForwardParams& p;
  SequenceInfo sequence;
  int64_t batch_head;
  T scale, softcap, slope;
  bool has_slope;
  /// Scores are kept in units of q.k when nothing but masks follows, so that scaling is part of the exponential;
  /// otherwise `extended` scores are complete.
  bool extended;
  T exponent_scale;         // exp(score) = 2^(exponent_scale * kept score)
  const char* mask;         // of this batch and head
  mask::PackedMask packed;  // if it was read before
  int64_t b, h;

  ScoreRules(const ForwardParams& p, const SequenceInfo& sequence, int64_t b, int64_t h)
      : p(p),
        sequence(sequence),
        batch_head(b * p.num_heads + h),
        scale(T(p.softmax_scale)),
        softcap(T(p.softcap)),
        b(b),
        h(h) {
    if (p.mask.packed != nullptr) packed = mask::place_packed(p.mask, p.mask.packed);
    has_slope = p.alibi_slopes != nullptr;
    slope =
        has_slope ? static_cast<const T*>(p.alibi_slopes)[b * p.alibi_batch_stride + h * p.alibi_head_stride] : T(0);
    const bool biased = p.mask.data != nullptr && p.mask.dtype != DType::kBool;
    extended = p.softcap > 0.0 || biased || has_slope || p.sinks != nullptr || !(p.softmax_scale > 0.0);
    exponent_scale = T(extended ? kLog2E : kLog2E * p.softmax_scale);
    mask = static_cast<const char*>(p.mask.data) + (b * p.mask.batch + h * p.mask.head) * size_of(p.mask.dtype);
  }

  const char* mask_at(int64_t row, int64_t column) const {
    return mask + (row * p.mask.row + column * p.mask.col) * size_of(p.mask.dtype);
  }
};

template <typename T, typename Storage>
FLASH_ATTN_INLINE Vec<T> load_bias(const Storage* p) {
  if constexpr (std::is_same_v<T, double> && std::is_same_v<Storage, float>) {
    return __builtin_convertvector(load_vector<typename VectorOf<float, kVectorBytes / 2>::type>(p), Vec<double>);
  } else {
    return load<T>(p);
  }
}

template <typename T, typename Storage>
FLASH_ATTN_INLINE Vec<T> load_bias_up_to(const Storage* p, int64_t count) {
  if (count >= kLanes<T>) return load_bias<T>(p);
  Storage lanes[kLanes<T>];
  copy_partial<kLanes<T>>(lanes, p, count);
  return load_bias<T>(lanes);
}

template <typename T, typename F>
FLASH_ATTN_INLINE void with_bias_storage(DType dtype, F f) {
  if constexpr (std::is_same_v<T, double>) {
    if (dtype == DType::kFloat32) return f(static_cast<const float*>(nullptr));
  }
  with_storage<T>(dtype, f);
}

template <typename T>
FLASH_ATTN_INLINE bool any_lane(IntVec<T> mask) {
  Vec<uint64_t> words = bit_cast<Vec<uint64_t>>(mask);
  uint64_t any = 0;
  for (int i = 0; i < kLanes<uint64_t>; ++i) any |= words[i];
  return any != 0;
}

}  // namespace
}  // namespace flash_attn::cpu
