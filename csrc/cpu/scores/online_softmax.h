// The online softmax of a tile of scores with rows as lanes (Milakov and Gimelshein 2018), and its result as operands.
#pragma once

#include "scores.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

/// Row maxima stay as they are until scores exceed them by so much, in powers of 2: sums hold that, and to multiply
/// what was summed up before takes as long as half of a product (FlashAttention-4 does so with a limit of 8, too).
template <typename T>
constexpr T kMaxGrowth = T(8);

/// What runs between the pieces of a softmax: nothing.
struct Nothing {
  void operator()() const {}
};

/// The softmax of a tile's query rows.
template <typename Arithmetic>
struct Softmax {
  using T = typename Arithmetic::Acc;
  using Operand = typename Arithmetic::Operand;
  T exponent_scale;
  T *row_max, *row_sum;
  T* rescale;  // gets what older sums are to be multiplied by
  int64_t ld;

  /// Columns of a piece, of one vector of rows.
  static constexpr int64_t kPiece = 8;

  /// Scores s (columns, ld) become probabilities relative to the row maxima, or what stands for them, as operands of a
  /// sum over columns: p (columns / kPack, ld), which may be s unless operands are pairs. With kDrops they are 0 where
  /// `kept` is, (columns, byte_stride(ld)), but counted. `between` is called before each piece of them.
  /// False: older sums are to be multiplied by 1, all of them.
  template <bool kDrops, typename Between = Nothing>
  bool apply(const Tile& tile, const T* s, Operand* p, const uint8_t* kept, Between between = {}) const {
    IntVec<T> changed{};
    for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<T>) {
      const Vec<T> old_max = load<T>(row_max + lane);
      const auto probabilities = [&](Vec<T> shift, auto call) {
        return to_probabilities<kDrops>(tile.columns, shift, s + lane, p + lane, kDrops ? kept + lane : nullptr, call);
      };
      Vec<T> new_max = old_max, sum;
      // A maximum that was found before serves most tiles: whether it does, their sums show.
      if (kSumsShowGrowth && !any_lane<T>(old_max == -kInfinity<T>)) {
        sum = probabilities(old_max, between);
        if (any_lane<T>(!(sum <= T(1 << int(kMaxGrowth<T>))))) {
          new_max = grown_max(tile, s + lane, old_max);
          sum = probabilities(new_max, Nothing());
        }
      } else {
        new_max = grown_max(tile, s + lane, old_max);
        sum = probabilities(finite_shift(new_max), between);
      }
      const Vec<T> alpha = exp2<T>(old_max - finite_shift(new_max), exponent_scale);
      store<T>(row_max + lane, new_max);
      store<T>(row_sum + lane, load<T>(row_sum + lane) * alpha + sum);
      store<T>(rescale + lane, alpha);
      changed |= alpha != T(1);
    }
    return any_lane<T>(changed);
  }

 private:
  static constexpr bool kPairs = Arithmetic::kPack == 2;
  static constexpr bool kSumsShowGrowth = kPairs;  // scores are there still

  static Vec<T> finite_shift(Vec<T> max) { return max == -kInfinity<T> ? Vec<T>{} : max; }  // -inf - -inf would be NaN

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

  template <bool kDrops, typename Between>
  Vec<T> to_probabilities(int64_t columns, Vec<T> shift, const T* s, Operand* p, const uint8_t* kept,
                          Between between) const {
#if defined(__AMX_BF16__)
    if constexpr (kPairs) {
      // One rounding of shift * exponent_scale is the same for all of a row; but beyond this it is seen in lse.
      constexpr T kMaxRounded = T(1024);
      const Vec<T> start = shift * exponent_scale;
      if (!any_lane<T>((start < -kMaxRounded) | (start > kMaxRounded))) {
        return sum_pieces<kDrops>(columns, p, kept, between,
                                  [&](int64_t n) { return exp2_short(load<T>(s + n * ld) * exponent_scale - start); });
      }
      return sum_pieces<kDrops>(columns, p, kept, between,
                                [&](int64_t n) { return exp2_short((load<T>(s + n * ld) - shift) * exponent_scale); });
    }
#endif
    return sum_pieces<kDrops>(columns, p, kept, between,
                              [&](int64_t n) { return exp2<T, kPairs>(load<T>(s + n * ld) - shift, exponent_scale); });
  }

  /// Of one vector of rows; returns their sums.
  template <bool kDrops, typename Between, typename Probability>
  Vec<T> sum_pieces(int64_t columns, Operand* p, const uint8_t* kept, Between between, Probability probability) const {
    Vec<T> even_sum{}, odd_sum{};
    int64_t n = 0;
    for (; n + kPiece <= columns; n += kPiece) {
      between();
      for (int64_t i = 0; i < kPiece; i += 2) two_columns<kDrops>(n + i, p, kept, probability, even_sum, odd_sum);
    }
    for (; n + 2 <= columns; n += 2) two_columns<kDrops>(n, p, kept, probability, even_sum, odd_sum);
    if (n < columns) {
      const Vec<T> even = probability(n);
      even_sum += even;
      put(n, left<kDrops>(even, n, kept), Vec<T>{}, p, true);
    }
    return even_sum + odd_sum;
  }

  template <bool kDrops, typename Probability>
  FLASH_ATTN_INLINE void two_columns(int64_t n, Operand* p, const uint8_t* kept, Probability probability,
                                     Vec<T>& even_sum, Vec<T>& odd_sum) const {
    const Vec<T> even = probability(n), odd = probability(n + 1);
    even_sum += even;
    odd_sum += odd;
    put(n, left<kDrops>(even, n, kept), left<kDrops>(odd, n + 1, kept), p, false);
  }

  template <bool kDrops>
  FLASH_ATTN_INLINE Vec<T> left(Vec<T> x, int64_t n, const uint8_t* kept) const {
    if constexpr (kDrops) return load_bytes<T>(kept + n * byte_stride(ld)) == 0 ? Vec<T>{} : x;
    return x;
  }

  /// Columns n and n + 1, or n alone if it is the last.
  FLASH_ATTN_INLINE void put(int64_t n, Vec<T> even, Vec<T> odd, Operand* p, bool last) const {
    if constexpr (kPairs) {
#if defined(__AMX_BF16__)
      store_vector(p + n / 2 * ld, round_to_pairs(even, odd));
#elif defined(__AVX512BF16__)
      store_vector(p + n / 2 * ld, interleave(round_to_bfloat16(even, odd)));
#endif
    } else {
      store<T>(p + n * ld, even);
      if (!last) store<T>(p + (n + 1) * ld, odd);
    }
  }
};

}  // namespace
}  // namespace flash_attn::cpu
