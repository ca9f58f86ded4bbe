// The online softmax of a tile of scores with rows as lanes (Milakov and Gimelshein 2018), and its result as operands.
#pragma once

#include "scores.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

/// Row maxima stay as they are until scores exceed them by so much, in powers of 2: sums hold that, and to multiply
/// what was summed up before takes as long as half of a product (FlashAttention-4 does so with a limit of 8, too).
template <typename T>
constexpr T kMaxGrowth = T(8);

/// Scores become probabilities relative to the row maxima, or what stands for them; `rescale` is what older sums are to
/// be multiplied by. False: by 1, all of them.
template <typename T>
bool online_softmax(const Tile& tile, T* s, int64_t ld, T exponent_scale, T* row_max, T* row_sum, T* rescale) {
  constexpr int W = kLanes<T>;
  IntVec<T> changed{};
  for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += W) {
    const Vec<T> old_max = load<T>(row_max + lane);
    Vec<T> partial_max[4] = {old_max, old_max, old_max, old_max};
    T* column = s + lane;
    int64_t n = 0;
    for (; n + 4 <= tile.columns; n += 4) {
      for (int i = 0; i < 4; ++i) partial_max[i] = max<T>(load<T>(column + (n + i) * ld), partial_max[i]);
    }
    for (; n < tile.columns; ++n) partial_max[0] = max<T>(load<T>(column + n * ld), partial_max[0]);
    Vec<T> new_max = max<T>(max<T>(partial_max[0], partial_max[1]), max<T>(partial_max[2], partial_max[3]));
    if (!any_lane<T>((new_max - old_max) * exponent_scale > kMaxGrowth<T>)) new_max = old_max;
    const Vec<T> shift = new_max == -kInfinity<T> ? Vec<T>{} : new_max;  // -inf - -inf would be NaN
    const Vec<T> alpha = exp2<T>(old_max - shift, exponent_scale);
    const auto probability = [&](int64_t column_n) {
      const Vec<T> p = exp2<T>(load<T>(column + column_n * ld) - shift, exponent_scale);
      store<T>(column + column_n * ld, p);
      return p;
    };
    Vec<T> sum{}, odd_sum{};
    for (n = 0; n + 2 <= tile.columns; n += 2) {
      sum += probability(n);
      odd_sum += probability(n + 1);
    }
    if (n < tile.columns) sum += probability(n);
    store<T>(row_max + lane, new_max);
    store<T>(row_sum + lane, load<T>(row_sum + lane) * alpha + (sum + odd_sum));
    store<T>(rescale + lane, alpha);
    changed |= alpha != T(1);
  }
  return any_lane<T>(changed);
}

/// Probabilities (columns, ld) as operands of a sum over columns.
template <typename Arithmetic>
void pack_probabilities(const Tile& tile, const typename Arithmetic::Acc* s, typename Arithmetic::Operand* p,
                        int64_t ld) {
#if defined(__AVX512BF16__)
  for (int64_t n = 0; n < tile.columns; n += 2) {
    for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<float>) {
      const Vec<float> odd = n + 1 < tile.columns ? load<float>(s + (n + 1) * ld + lane) : Vec<float>{};
      store_vector(p + n / 2 * ld + lane, interleave(round_to_bfloat16(load<float>(s + n * ld + lane), odd)));
    }
  }
#else
  (void)tile, (void)s, (void)p, (void)ld;  // they are operands as they are
#endif
}

}  // namespace
}  // namespace flash_attn::cpu
