// Rows into a cache, and rotary embeddings, on the CPU.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu.h"
#include "parallel.h"

namespace flash_attn::cpu {
namespace {

constexpr int64_t kRowsOfTask = 16;

/// Calls f with a null pointer to the type of `dtype`.
template <typename F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64: return f(static_cast<double*>(nullptr));
    case DType::kFloat32: return f(static_cast<float*>(nullptr));
    case DType::kBFloat16: return f(static_cast<c10::BFloat16*>(nullptr));
    default: return f(static_cast<c10::Half*>(nullptr));
  }
}

template <typename T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
class RowCopier {
  using Acc = Arithmetic<T>;

 public:
  /// `tables` has room for cos and sin of a position.
  RowCopier(const RowCopies& p, void* tables) : p_(p), cos_(static_cast<Acc*>(tables)), sin_(cos_ + p.rotary.pairs) {}

  void copy(int64_t b, int64_t row) {
    const RowPlace place = row_place(p_, b, row);
    if (!place.exists) return;
    const bool turns = p_.rotary.exists() && place.position >= 0;
    if (turns) read_tables(table_row(p_.rotary, place.position));
    for (int i = 0; i < p_.count; ++i) {
      const RowCopy& copy = p_.copies[i];
      const T* from = static_cast<const T*>(copy.from.data) + place.entry * copy.from.batch + place.row * copy.from.row;
      T* to = static_cast<T*>(copy.to.data) + destination(p_, copy.to, b, place);
      for (int64_t h = 0; h < copy.heads; ++h, from += copy.from.head, to += copy.to.head) {
        const int64_t turned = turns && copy.turned ? 2 * p_.rotary.pairs : 0;
        if (turned > 0) turn(from, to);
        if (from != to) std::memcpy(to + turned, from + turned, size_t(copy.columns - turned) * sizeof(T));
      }
    }
  }

 private:
  void read_tables(int64_t position) {
    const Rotary& r = p_.rotary;
    with_type(r.dtype, [&](auto* type) {
      using Table = std::remove_pointer_t<decltype(type)>;
      const Table* cos = static_cast<const Table*>(r.cos) + position * r.cos_stride;
      const Table* sin = static_cast<const Table*>(r.sin) + position * r.sin_stride;
      for (int64_t j = 0; j < r.pairs; ++j) {
        cos_[j] = Acc(cos[j]);
        sin_[j] = r.conjugate ? -Acc(sin[j]) : Acc(sin[j]);
      }
    });
  }

  void turn(const T* from, T* to) const {
    const int64_t pairs = p_.rotary.pairs, step = p_.rotary.interleaved ? 2 : 1;
    const int64_t second = p_.rotary.interleaved ? 1 : pairs;
    for (int64_t j = 0; j < pairs; ++j) {
      const Acc x1 = Acc(from[step * j]), x2 = Acc(from[step * j + second]);
      to[step * j] = T(x1 * cos_[j] - x2 * sin_[j]);
      to[step * j + second] = T(x1 * sin_[j] + x2 * cos_[j]);
    }
  }

  const RowCopies& p_;
  Acc *cos_, *sin_;
};

template <typename T>
void copy_task(const void* context, int64_t index, void* scratch) {
  const RowCopies& p = *static_cast<const RowCopies*>(context);
  RowCopier<T> copier(p, scratch);
  const int64_t begin = index * kRowsOfTask, end = std::min(begin + kRowsOfTask, p.batch * p.rows);
  for (int64_t i = begin; i < end; ++i) copier.copy(i / p.rows, i % p.rows);
}

}  // namespace

void copy_rows(const RowCopies& copies, void*) {
  with_type(copies.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(ceil_div(copies.batch * copies.rows, kRowsOfTask),
              2 * copies.rotary.pairs * int64_t(sizeof(Arithmetic<T>)), copy_task<T>, &copies);
  });
}

}  // namespace flash_attn::cpu
