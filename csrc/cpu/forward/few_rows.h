// A tile of the forward pass for so few query rows that most lanes would idle if rows were lanes. Here keys are the
// lanes of a row's scores and head dimensions those of its result, and k and v are read once, where they lie: memory is
// the limit, not arithmetic. What is read next is prefetched, because k and v take turns.
#pragma once

#include "../parallel.h"
#include "../scores/scores.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

/// So many query rows are few.
template <typename T>
constexpr int64_t kFewRows = kLanes<T> >= 8 ? kLanes<T> / 4 : 1;
constexpr int kFewRowsVectors = 8;  // of a row of v at a time: enough sums to hide the latency of an addition

template <typename Storage>
FLASH_ATTN_INLINE void prefetch_row(const Storage* row, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kCacheLine / int64_t(sizeof(Storage))) __builtin_prefetch(row + c, 0, 2);
}

/// Products of a row of k with q, summed up to the lanes.
template <typename Arithmetic, typename Storage>
FLASH_ATTN_INLINE Vec<typename Arithmetic::Acc> dot_lanes(const Storage* row, int64_t columns,
                                                          const typename Arithmetic::Operand* q) {
  using Operand = typename Arithmetic::Operand;
  constexpr int W = kLanes<Operand>;
  Vec<typename Arithmetic::Acc> even{}, odd{};
  const auto add = [&](auto& sum, int64_t c) {
    sum = Arithmetic::multiply_add(sum, load_operands<Operand>(row, c, columns), load_vector<Vec<Operand>>(q + c));
  };
  int64_t c = 0;
  for (; (c + 2 * W) * Arithmetic::kPack <= columns; c += 2 * W) {
    add(even, c);
    add(odd, c + W);
  }
  for (; c * Arithmetic::kPack < columns; c += W) add(even, c);
  return even + odd;
}

/// s (rows, ld) = q keys^T for q (rows, ldq), operands along rows; whole vectors of s are written. `next` is what is
/// read after these keys, and what follows them in memory after that.
template <typename Arithmetic>
void score_few_rows(const Rows& keys, const Rows& next, const typename Arithmetic::Operand* q, int64_t ldq,
                    int64_t rows, typename Arithmetic::Acc* s, int64_t ld) {
  using Acc = typename Arithmetic::Acc;
  constexpr int W = kLanes<Acc>;
  with_operand_storage<Arithmetic>(keys.dtype, [&](auto type) {
    const auto* k = static_cast<decltype(type)>(keys.data);
    const auto* v = static_cast<decltype(type)>(next.data);
    for (int64_t n = 0; n < keys.count; n += W) {
      const int64_t count = min(W, keys.count - n);
      for (int64_t m = 0; m < rows; ++m) {
        Vec<Acc> sums[W] = {};
        for (int64_t i = 0; i < count; ++i) {
          sums[i] = dot_lanes<Arithmetic>(k + (n + i) * keys.stride, keys.columns, q + m * ldq);
          if (m == 0) {
            prefetch_row(v + (n + i) * next.stride, next.columns);
            prefetch_row(k + (n + i + keys.count) * keys.stride, keys.columns);
          }
        }
        store<Acc>(s + m * ld + n, sum_lanes<Acc>(sums));
      }
    }
  });
}

/// Scores of one row become probabilities, as online_softmax has it. Returns what older sums are to be multiplied by.
template <typename T>
T softmax_few_row(T* s, int64_t columns, T exponent_scale, T& row_max, T& row_sum) {
  constexpr int W = kLanes<T>;
  for (int64_t n = columns; n < round_up(columns, W); ++n) s[n] = -kInfinity<T>;
  Vec<T> max_lanes = broadcast<T>(row_max);
  for (int64_t n = 0; n < columns; n += W) max_lanes = max<T>(load<T>(s + n), max_lanes);
  T new_max = max_lanes[0];
  for (int i = 1; i < W; ++i) new_max = max_lanes[i] > new_max ? max_lanes[i] : new_max;
  const T shift = new_max == -kInfinity<T> ? T(0) : new_max;  // -inf - -inf would be NaN
  const T alpha = exp2<T>(broadcast<T>(row_max) - shift, exponent_scale)[0];
  Vec<T> sums{};
  for (int64_t n = 0; n < columns; n += W) {
    const Vec<T> p = exp2<T>(load<T>(s + n) - shift, exponent_scale);
    store<T>(s + n, p);
    sums += p;
  }
  T sum = T(0);
  for (int i = 0; i < W; ++i) sum += sums[i];
  row_max = new_max;
  row_sum = row_sum * alpha + sum;
  return alpha;
}

/// kVectors vectors of one row: out = factor * out + p values. `dead`, when given, marks keys that are not read.
template <typename T, int kVectors, typename Storage>
FLASH_ATTN_INLINE void add_few_columns(const Storage* values, int64_t stride, int64_t keys, int64_t columns, const T* p,
                                       const uint8_t* dead, T factor, T* out) {
  constexpr int W = kLanes<T>;
  Vec<T> sums[kVectors] = {};
  for (int64_t n = 0; n < keys; ++n) {
    if (dead != nullptr && dead[n] != 0) continue;
    const Storage* row = values + n * stride;
    for (int j = 0; j < kVectors; ++j) {
      sums[j] += (kVectors > 1 ? load<T>(row + j * W) : load_up_to<T>(row, columns)) * p[n];
    }
  }
  for (int j = 0; j < kVectors; ++j) store<T>(out + j * W, load<T>(out + j * W) * factor + sums[j]);
}

/// All columns of one row.
template <typename Arithmetic>
void add_few_row(const Rows& values, const typename Arithmetic::Acc* p, const uint8_t* dead,
                 typename Arithmetic::Acc factor, typename Arithmetic::Acc* out) {
  using Acc = typename Arithmetic::Acc;
  constexpr int W = kLanes<Acc>;
  with_operand_storage<Arithmetic>(values.dtype, [&](auto type) {
    const auto* data = static_cast<decltype(type)>(values.data);
    int64_t c = 0;
    const auto add = [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      for (; c + (kVectors > 1 ? kVectors * W : 1) <= values.columns; c += kVectors * W) {
        add_few_columns<Acc, kVectors>(data + c, values.stride, values.count, values.columns - c, p, dead, factor,
                                       out + c);
      }
    };
    add(std::integral_constant<int, kFewRowsVectors>());
    add(std::integral_constant<int, kFewRowsVectors / 2>());
    add(std::integral_constant<int, 1>());
  });
}

}  // namespace
}  // namespace flash_attn::cpu
