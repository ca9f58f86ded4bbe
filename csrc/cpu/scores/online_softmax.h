// The online softmax of a tile of scores with rows as lanes (Milakov and Gimelshein 2018), and its result as operands.
#pragma once

#include "scores.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

/// Row maxima stay as they are until scores exceed them by so much, in powers of 2: sums hold that, and to multiply
/// what was summed up before takes as long as half of a product (FlashAttention-4 does so with a limit of 8, too).
template <typename T>
constexpr T kMaxGrowth = T(8);

/// The softmax of a tile's query rows.
template <typename Arithmetic>
struct Softmax {
  using T = typename Arithmetic::Acc;
  using Operand = typename Arithmetic::Operand;
  T exponent_scale;
  T *row_max, *row_sum;
  T* rescale;  // gets what older sums are to be multiplied by
  int64_t ld;

  /// Scores s (columns, ld) become probabilities relative to the row maxima, or what stands for them, as operands of a
  /// sum over columns: p (columns / kPack, ld), which may be s unless operands are pairs. With kDrops they are 0 where
  /// `kept` is, (columns, byte_stride(ld)), but counted. False: older sums are to be multiplied by 1, all of them.
  template <bool kDrops>
  bool apply(const Tile& tile, const T* s, Operand* p, const uint8_t* kept) const {
    IntVec<T> changed{};
    for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<T>) {
      const uint8_t* const kept_lanes = kDrops ? kept + lane : nullptr;
      const Vec<T> old_max = load<T>(row_max + lane);
      Vec<T> new_max = old_max, sum;
      // The maxima of tiles before serve most tiles. Whether they do here, the sums show, if scores are still there to
      // be looked at again.
      const bool first = any_lane<T>(old_max == -kInfinity<T>);
      if (!kPairs || first) new_max = grown_max(tile, s + lane, old_max);
      sum = to_probabilities<kDrops>(tile.columns, new_max, s + lane, p + lane, kept_lanes);
      if (kPairs && !first && any_lane<T>(~(sum <= kMaxSum))) {
        new_max = grown_max(tile, s + lane, old_max);
        sum = to_probabilities<kDrops>(tile.columns, new_max, s + lane, p + lane, kept_lanes);
      }
      const Vec<T> alpha = exp2<T>(old_max - finite(new_max), exponent_scale);
      store<T>(row_max + lane, new_max);
      store<T>(row_sum + lane, load<T>(row_sum + lane) * alpha + sum);
      store<T>(rescale + lane, alpha);
      changed |= (alpha != T(1)) & (old_max != -kInfinity<T>);  // before the first score, sums are 0
    }
    return any_lane<T>(changed);
  }

 private:
  static constexpr bool kPairs = Arithmetic::kPack == 2;
  static constexpr T kMaxSum = T(1 << int(kMaxGrowth<T>));

  static Vec<T> finite(Vec<T> max) { return max == -kInfinity<T> ? Vec<T>{} : max; }  // -inf - -inf would be NaN

  Vec<T> grown_max(const Tile& tile, const T* s, Vec<T> old_max) const {
    Vec<T> partial_max[4] = {old_max, old_max, old_max, old_max};
    int64_t n = 0;
    for (; n + 4 <= tile.columns; n += 4) {
      for (int i = 0; i < 4; ++i) partial_max[i] = max<T>(load<T>(s + (n + i) * ld), partial_max[i]);
    }
    for (; n < tile.columns; ++n) partial_max[0] = max<T>(load<T>(s + n * ld), partial_max[0]);
    const Vec<T> new_max = max<T>(max<T>(partial_max[0], partial_max[1]), max<T>(partial_max[2], partial_max[3]));
    return any_lane<T>((new_max - old_max) * exponent_scale > kMaxGrowth<T>) ? new_max : old_max;
  }

  /// Of one vector of rows; returns their sums.
  template <bool kDrops>
  Vec<T> to_probabilities(int64_t columns, Vec<T> max, const T* s, Operand* p, const uint8_t* kept) const {
    const Vec<T> shift = finite(max);
#if defined(__AMX_BF16__)
    if constexpr (kPairs) {
      // One rounding of shift * exponent_scale is the same for all of a row; but beyond this it is seen in lse.
      constexpr T kMaxRounded = T(1024);
      const Vec<T> start = shift * exponent_scale;
      if (!any_lane<T>((start < -kMaxRounded) | (start > kMaxRounded))) {
        return put_all<kDrops>(columns, p, kept,
                               [&](int64_t n) { return exp2_short(load<T>(s + n * ld) * exponent_scale - start); });
      }
      return put_all<kDrops>(columns, p, kept,
                             [&](int64_t n) { return exp2_short((load<T>(s + n * ld) - shift) * exponent_scale); });
    }
#endif
    return put_all<kDrops>(columns, p, kept,
                           [&](int64_t n) { return exp2<T, kPairs>(load<T>(s + n * ld) - shift, exponent_scale); });
  }

  /// probability(column) of all columns; returns their sums.
  template <bool kDrops, typename Probability>
  FLASH_ATTN_INLINE Vec<T> put_all(int64_t columns, Operand* p, const uint8_t* kept, Probability probability) const {
    const int64_t stride = byte_stride(ld);
    const auto left = [&](Vec<T> x, int64_t n) {
      if constexpr (kDrops) return load_bytes<T>(kept + n * stride) == 0 ? Vec<T>{} : x;
      return x;
    };
    Vec<T> even_sum{}, odd_sum{};
    int64_t n = 0;
    for (; n + 2 <= columns; n += 2) {
      const Vec<T> even = probability(n), odd = probability(n + 1);
      even_sum += even;
      odd_sum += odd;
      put(n, left(even, n), left(odd, n + 1), p);
    }
    if (n < columns) {
      const Vec<T> even = probability(n);
      even_sum += even;
      if constexpr (kPairs) {
        put(n, left(even, n), Vec<T>{}, p);
      } else {
        store<T>(p + n * ld, left(even, n));
      }
    }
    return even_sum + odd_sum;
  }

  FLASH_ATTN_INLINE void put(int64_t n, Vec<T> even, Vec<T> odd, Operand* p) const {
    if constexpr (kPairs) {
#if defined(__AMX_BF16__)
      store_vector(p + n / 2 * ld, round_to_pairs(even, odd));
#elif defined(__AVX512BF16__)
      store_vector(p + n / 2 * ld, interleave(round_to_bfloat16(even, odd)));
#endif
    } else {
      store<T>(p + n * ld, even);
      store<T>(p + (n + 1) * ld, odd);
    }
  }
};

}  // namespace
}  // namespace flash_attn::cpu
