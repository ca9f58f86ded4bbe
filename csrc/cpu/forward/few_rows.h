// A tile of the forward pass for so few query rows that most lanes would idle if rows were lanes. Here keys are the
// lanes of a row's scores and head dimensions those of its result, and k and v are read once, where they lie: memory is
// the limit, not arithmetic. What is read next is prefetched where it comes from far, because k and v take turns.
#pragma once

#include "../parallel.h"
#include "../scores/scores.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

/// So many query rows are few.
template <typename T>
constexpr int64_t kFewRows = kLanes<T> >= 8 ? 4 : 1;
// Of sums at a time: enough to hide the latency of an addition, and to read what several rows share once.
template <typename T, int kRows>
constexpr int kFewRowsVectors = kRows == 1 ? 8 : (sizeof(Vec<T>) == 64 ? 16 : 8) / kRows;
constexpr int64_t kNearBytes = 4 << 20;  // of all keys and values: so many are in a cache, where prefetching costs more

template <typename Storage>
FLASH_ATTN_INLINE void prefetch_row(const Storage* row, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kCacheLine / int64_t(sizeof(Storage))) __builtin_prefetch(row + c, 0, 2);
}

/// Calls f(integral_constant(rows at once), first row) until all rows had their turn: what was loaded serves several.
template <typename F>
FLASH_ATTN_INLINE void for_groups_of_rows(int64_t rows, F f) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) f(std::integral_constant<int, 4>(), m);
  for (; m + 2 <= rows; m += 2) f(std::integral_constant<int, 2>(), m);
  if (m < rows) f(std::integral_constant<int, 1>(), m);
}

/// Products of a row of k with kRows rows of q, (kRows, ldq), summed up to the lanes.
template <typename Arithmetic, int kRows, typename Storage>
FLASH_ATTN_INLINE void dot_lanes(const Storage* row, int64_t columns, const typename Arithmetic::Operand* q,
                                 int64_t ldq, Vec<typename Arithmetic::Acc>* sums) {
  using Operand = typename Arithmetic::Operand;
  constexpr int W = kLanes<Operand>, kNumbers = W * Arithmetic::kPack;
  Vec<typename Arithmetic::Acc> even[kRows] = {}, odd[kRows] = {};
  const auto add = [&](auto* to, const Vec<Operand>& k, int64_t c) {
    for (int r = 0; r < kRows; ++r)
      to[r] = Arithmetic::multiply_add(to[r], k, load_vector<Vec<Operand>>(q + r * ldq + c));
  };
  int64_t c = 0, left = columns;
  for (; left >= 2 * kNumbers; c += 2 * W, left -= 2 * kNumbers) {
    const Storage* k = row + c * Arithmetic::kPack;
    add(even, load_operands<Operand>(k, 0, kNumbers), c);
    add(odd, load_operands<Operand>(k + kNumbers, 0, kNumbers), c + W);
  }
  for (; left > 0; c += W, left -= kNumbers) add(even, load_operands<Operand>(row, c, columns), c);
  for (int r = 0; r < kRows; ++r) sums[r] = even[r] + odd[r];
}

/// s (rows, ld) = q keys^T for q (rows, ldq), operands along rows; whole vectors of s are written. `next`, when given,
/// is read after these keys, and what follows them in memory after that: both are prefetched.
template <typename Arithmetic>
void score_few_rows(const Rows& keys, const Rows* next, const typename Arithmetic::Operand* q, int64_t ldq,
                    int64_t rows, typename Arithmetic::Acc* s, int64_t ld) {
  using Acc = typename Arithmetic::Acc;
  constexpr int W = kLanes<Acc>;
  with_operand_storage<Arithmetic>(keys.dtype, [&](auto type) {
    const auto* k = static_cast<decltype(type)>(keys.data);
    for (int64_t n = 0; n < keys.count; n += W) {
      const int64_t count = min(W, keys.count - n);
      for_groups_of_rows(rows, [&](auto at_once, int64_t m) {
        constexpr int kRows = decltype(at_once)::value;
        Vec<Acc> sums[kRows][W] = {};
        for (int64_t i = 0; i < count; ++i) {
          Vec<Acc> dots[kRows];
          dot_lanes<Arithmetic, kRows>(k + (n + i) * keys.stride, keys.columns, q + m * ldq, ldq, dots);
          for (int r = 0; r < kRows; ++r) sums[r][i] = dots[r];
          if (m == 0 && next != nullptr) {
            prefetch_row(static_cast<decltype(type)>(next->data) + (n + i) * next->stride, next->columns);
            prefetch_row(k + (n + i + keys.count) * keys.stride, keys.columns);
          }
        }
        for (int r = 0; r < kRows; ++r) store<Acc>(s + (m + r) * ld + n, sum_lanes<Acc>(sums[r]));
      });
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

/// kVectors vectors of kRows rows: out (kRows, ldo) = factor * out + p values, for p (kRows, ldp). `dead`, when given,
/// marks keys that are not read.
template <typename T, int kRows, int kVectors, typename Storage>
FLASH_ATTN_INLINE void add_few_columns(const Storage* values, int64_t stride, int64_t keys, int64_t columns, const T* p,
                                       int64_t ldp, const uint8_t* dead, const T* factor, T* out, int64_t ldo) {
  constexpr int W = kLanes<T>;
  Vec<T> sums[kRows][kVectors] = {};
  for (int64_t n = 0; n < keys; ++n) {
    if (dead != nullptr && dead[n] != 0) continue;
    const Storage* row = values + n * stride;
    for (int j = 0; j < kVectors; ++j) {
      const Vec<T> value = kVectors > 1 ? load<T>(row + j * W) : load_up_to<T>(row, columns);
      for (int r = 0; r < kRows; ++r) sums[r][j] += value * p[r * ldp + n];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    T* const to = out + r * ldo;
    for (int j = 0; j < kVectors; ++j) store<T>(to + j * W, load<T>(to + j * W) * factor[r] + sums[r][j]);
  }
}

/// All columns of `rows` rows: p (rows, ldp), factor (rows), out (rows, ldo).
template <typename Arithmetic>
void add_few_rows(const Rows& values, int64_t rows, const typename Arithmetic::Acc* p, int64_t ldp, const uint8_t* dead,
                  const typename Arithmetic::Acc* factor, typename Arithmetic::Acc* out, int64_t ldo) {
  using Acc = typename Arithmetic::Acc;
  constexpr int W = kLanes<Acc>;
  with_operand_storage<Arithmetic>(values.dtype, [&](auto type) {
    const auto* data = static_cast<decltype(type)>(values.data);
    for_groups_of_rows(rows, [&](auto at_once, int64_t m) {
      constexpr int kRows = decltype(at_once)::value;
      int64_t c = 0;
      const auto add = [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        for (; c + (kVectors > 1 ? kVectors * W : 1) <= values.columns; c += kVectors * W) {
          add_few_columns<Acc, kRows, kVectors>(data + c, values.stride, values.count, values.columns - c, p + m * ldp,
                                                ldp, dead, factor + m, out + m * ldo + c, ldo);
        }
      };
      constexpr int kMost = kFewRowsVectors<Acc, kRows>;
      add(std::integral_constant<int, kMost>());
      if constexpr (kMost > 2) add(std::integral_constant<int, kMost / 2>());
      add(std::integral_constant<int, 1>());
    });
  });
}

}  // namespace
}  // namespace flash_attn::cpu
