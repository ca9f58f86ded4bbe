// A thread has a unit of a row of one head: kVec pairs of columns that turn together, or kVec columns that only move.
// Into a float8 cache numbers go as multiples of the head's descale, the largest where they are larger.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <type_traits>

#include "common/launch.h"
#include "copy_rows.h"

namespace flash_attn::cuda {
namespace {

constexpr int kThreads = 256;

struct CopyArguments {
  RowCopies copies;
  int64_t first_block;
  int64_t items[RowCopies::kMaxCopies];  // units of each copy
  int64_t units[RowCopies::kMaxCopies];  // of a row of a head
  int64_t heads[RowCopies::kMaxCopies];
};

template <typename T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Piece {
  T x[kCount];
};

template <typename Acc, typename T>
__device__ __forceinline__ Acc widened(T x) {
  if constexpr (sizeof(T) == 2) {
    return Acc(float(x));
  } else {
    return Acc(x);
  }
}

/// `x` as it is stored; `descale` is that of float8.
template <typename To, typename Acc>
__device__ __forceinline__ To stored(Acc x, float descale) {
  if constexpr (std::is_same_v<To, __nv_fp8_e4m3>) {
    To y;
    y.__x = __nv_cvt_float_to_fp8(float(x) / descale, __NV_SATFINITE, __NV_E4M3);
    return y;
  } else {
    return To(x);
  }
}

template <typename Acc, typename T>
__device__ __forceinline__ Acc table_entry(const Rotary& rotary, const void* table, int64_t i) {
  return rotary.dtype == DType::kFloat32 ? Acc(static_cast<const float*>(table)[i])
                                         : widened<Acc>(static_cast<const T*>(table)[i]);
}

/// Pairs [first, first + kVec) of a row.
template <typename T, typename To, int kVec>
__device__ __forceinline__ void turn(const Rotary& rotary, int64_t position, int first, const T* from, To* to,
                                     float descale) {
  using Acc = typename ArithmeticOf<T>::type;
  const int64_t row = table_row(rotary, position);
  Acc cos[kVec], sin[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    cos[i] = table_entry<Acc, T>(rotary, rotary.cos, row * rotary.cos_stride + first + i);
    sin[i] = table_entry<Acc, T>(rotary, rotary.sin, row * rotary.sin_stride + first + i);
    if (rotary.conjugate) sin[i] = -sin[i];
  }
  // Two pieces: those of the two halves, or of neighbours, where elements of a pair take turns.
  const int second = rotary.interleaved ? kVec : int(rotary.pairs), begin = rotary.interleaved ? 2 * first : first;
  const Piece<T, kVec> a = *reinterpret_cast<const Piece<T, kVec>*>(from + begin);
  const Piece<T, kVec> b = *reinterpret_cast<const Piece<T, kVec>*>(from + begin + second);
  Piece<To, kVec> c, d;
  const auto turn_pair = [&](T x1, T x2, To& to1, To& to2, int i) {
    const Acc y1 = widened<Acc>(x1), y2 = widened<Acc>(x2);
    to1 = stored<To>(y1 * cos[i] - y2 * sin[i], descale);
    to2 = stored<To>(y1 * sin[i] + y2 * cos[i], descale);
  };
  if (rotary.interleaved && kVec > 1) {
#pragma unroll
    for (int i = 0; i < kVec / 2; ++i) {
      turn_pair(a.x[2 * i], a.x[2 * i + 1], c.x[2 * i], c.x[2 * i + 1], i);
      turn_pair(b.x[2 * i], b.x[2 * i + 1], d.x[2 * i], d.x[2 * i + 1], kVec / 2 + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) turn_pair(a.x[i], b.x[i], c.x[i], d.x[i], i);
  }
  *reinterpret_cast<Piece<To, kVec>*>(to + begin) = c;
  *reinterpret_cast<Piece<To, kVec>*>(to + begin + second) = d;
}

template <typename T, typename To, int kVec>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(const __grid_constant__ CopyArguments arguments) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  if constexpr (std::is_same_v<To, __nv_fp8_e4m3>) return;  // which no kernel would read: the op refuses it
#endif
  const RowCopies& p = arguments.copies;
  int64_t item = (arguments.first_block + blockIdx.x) * kThreads + threadIdx.x;
  int which = 0;
  if (item >= arguments.items[0]) {
    item -= arguments.items[0];
    which = 1;
  }
  if (item >= arguments.items[which]) return;
  const RowCopy& copy = p.copies[which];
  const int64_t line = item / arguments.units[which], place_of = line / arguments.heads[which];
  const int unit = int(item - line * arguments.units[which]);
  const int64_t h = line - place_of * arguments.heads[which], b = place_of / p.rows, row = place_of - b * p.rows;
  const RowPlace place = row_place(p, b, row);
  if (!place.exists) return;
  const T* from = static_cast<const T*>(copy.from.data) + place.entry * copy.from.batch + place.row * copy.from.row +
                  h * copy.from.head;
  To* to = static_cast<To*>(copy.to.data) + destination(p, copy.to, b, place) + h * copy.to.head;
  const int pairs = copy.turned ? int(p.rotary.pairs) : 0, turning = pairs / kVec;
  const float descale = std::is_same_v<T, To> ? 1.f : p.descales[which].at(b, h);
  if (unit < turning && place.position >= 0) {
    return turn<T, To, kVec>(p.rotary, place.position, unit * kVec, from, to, descale);
  }
  if (static_cast<const void*>(from) == to) return;
  const auto move = [&](int column) {
    const Piece<T, kVec> piece = *reinterpret_cast<const Piece<T, kVec>*>(from + column);
    if constexpr (std::is_same_v<T, To>) {
      *reinterpret_cast<Piece<To, kVec>*>(to + column) = piece;
    } else {
      Piece<To, kVec> stored_piece;
#pragma unroll
      for (int i = 0; i < kVec; ++i) stored_piece.x[i] = stored<To>(widened<float>(piece.x[i]), descale);
      *reinterpret_cast<Piece<To, kVec>*>(to + column) = stored_piece;
    }
  };
  if (unit < turning) {
    move(2 * kVec * unit);
    move(2 * kVec * unit + kVec);
  } else {
    move(2 * pairs + (unit - turning) * kVec);
  }
}

/// Whether `vec` elements at a time stay inside the rows, and are aligned.
bool fits(const RowCopies& p, int vec, int size, int size_to) {
  const auto aligned = [&](const TensorView& view, int size) {
    return reinterpret_cast<uintptr_t>(view.data) % uintptr_t(vec * size) == 0 && view.batch % vec == 0 &&
           view.row % vec == 0 && view.head % vec == 0;
  };
  for (int i = 0; i < p.count; ++i) {
    const RowCopy& copy = p.copies[i];
    if (copy.columns % vec != 0 || !aligned(copy.from, size) || !aligned(copy.to, size_to)) return false;
    if (copy.turned && p.rotary.pairs % vec != 0) return false;
  }
  return true;
}

template <typename T, typename To, int kVec>
void launch(const RowCopies& p, cudaStream_t stream) {
  CopyArguments arguments{};
  arguments.copies = p;
  int64_t items = 0;
  for (int i = 0; i < p.count; ++i) {
    const int64_t pairs = p.copies[i].turned ? p.rotary.pairs : 0;
    const int64_t units = pairs / kVec + (p.copies[i].columns - 2 * pairs) / kVec;
    arguments.units[i] = std::max<int64_t>(1, units);
    arguments.heads[i] = std::max<int64_t>(1, p.copies[i].heads);
    arguments.items[i] = p.batch * p.rows * p.copies[i].heads * units;
    items += arguments.items[i];
  }
  launch_blocks(copy_rows_kernel<T, To, kVec>, arguments, ceil_div(items, kThreads), kThreads, 0, stream, "rows");
}

template <typename T, typename To = T>
void launch(const RowCopies& p, cudaStream_t stream) {
  constexpr int kWide = 16 / int(sizeof(T));
  (fits(p, kWide, sizeof(T), sizeof(To)) ? launch<T, To, kWide> : launch<T, To, 1>)(p, stream);
}

}  // namespace

void copy_rows(const RowCopies& copies, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (copies.to_float8) {
    return copies.dtype == DType::kBFloat16 ? launch<__nv_bfloat16, __nv_fp8_e4m3>(copies, stream)
                                            : launch<__half, __nv_fp8_e4m3>(copies, stream);
  }
  switch (copies.dtype) {
    case DType::kFloat64: return launch<double>(copies, stream);
    case DType::kFloat32: return launch<float>(copies, stream);
    case DType::kBFloat16: return launch<__nv_bfloat16>(copies, stream);
    default: return launch<__half>(copies, stream);
  }
}

}  // namespace flash_attn::cuda
