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
  /// sum over columns: p (columns / kPack, ld), which may be s. With kDrops they are 0 where `kept` is, (columns,
  /// byte_stride(ld)), but counted. False: older sums are to be multiplied by 1, all of them.
  template <bool kDrops>
  bool apply(const Tile& tile, T* s, Operand* p, const uint8_t* kept) const {
    IntVec<T> changed{};
    for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<T>) {
      const Vec<T> old_max = load<T>(row_max + lane), new_max = grown_max(tile, s + lane, old_max);
      const Vec<T> shift = new_max == -kInfinity<T> ? Vec<T>{} : new_max;  // -inf - -inf would be NaN
      const Vec<T> alpha = exp2<T>(old_max - shift, exponent_scale);
      const Vec<T> sum =
          to_probabilities<kDrops>(tile.columns, shift, s + lane, p + lane, kDrops ? kept + lane : nullptr);
      store<T>(row_max + lane, new_max);
      store<T>(row_sum + lane, load<T>(row_sum + lane) * alpha + sum);
      store<T>(rescale + lane, alpha);
      changed |= alpha != T(1);
    }
    return any_lane<T>(changed);
  }

 private:
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
  Vec<T> to_probabilities(int64_t columns, Vec<T> shift, const T* s, Operand* p, const uint8_t* kept) const {
    constexpr bool kPairs = Arithmetic::kPack == 2;
    const int64_t stride = byte_stride(ld);
    const auto probability = [&](int64_t n) { return exp2<T, kPairs>(load<T>(s + n * ld) - shift, exponent_scale); };
    const auto left = [&](Vec<T> x, int64_t n) {
      if constexpr (kDrops) return load_bytes<T>(kept + n * stride) == 0 ? Vec<T>{} : x;
      return x;
    };
    const auto put = [&](int64_t n, Vec<T> even, Vec<T> odd) {
      if constexpr (kPairs) {
#if defined(__AVX512BF16__)
        store_vector(p + n / 2 * ld, interleave(round_to_bfloat16(even, odd)));
#endif
      } else {
        store<T>(p + n * ld, even);
        store<T>(p + (n + 1) * ld, odd);
      }
    };
    Vec<T> even_sum{}, odd_sum{};
    int64_t n = 0;
    for (; n + 2 <= columns; n += 2) {
      const Vec<T> even = probability(n), odd = probability(n + 1);
      even_sum += even;
      odd_sum += odd;
      put(n, left(even, n), left(odd, n + 1));
    }
    if (n < columns) {
      const Vec<T> even = probability(n);
      even_sum += even;
      if constexpr (kPairs) {
        put(n, left(even, n), Vec<T>{});
      } else {
        store<T>(p + n * ld, left(even, n));
      }
    }
    return even_sum + odd_sum;
  }
};

}  // namespace
}  // namespace flash_attn::cpu
