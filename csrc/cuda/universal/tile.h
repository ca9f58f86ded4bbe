// Tiles: from and to global memory, and the two products.
#pragma once

#include "config.h"

namespace flash_attn::cuda::universal {
namespace {

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_acc(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (__is_same(T, __half)) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}
template <typename T>
__device__ __forceinline__ T from_acc(double x) {
  return x;
}

__device__ __forceinline__ void load_vector(const float* from, float (&x)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
__device__ __forceinline__ void load_vector(const double* from, double (&x)[2]) {
  const double2 v = *reinterpret_cast<const double2*>(from);
  x[0] = v.x, x[1] = v.y;
}
template <typename Acc>
__device__ __forceinline__ void load_vector(const Acc* from, Acc (&x)[1]) {
  x[0] = from[0];
}

/// Four neighbours in global memory, aligned to their size or to 16 bytes.
template <typename T>
struct alignas(sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16) Quad {
  T x[4];
};

/// May rows of this tensor be read four elements at a time?
inline bool is_quad_aligned(const TensorView& view, int64_t columns, int element_size) {
  const int64_t bytes = element_size * 4 < 16 ? element_size * 4 : 16;
  return reinterpret_cast<uintptr_t>(view.data) % uintptr_t(bytes) == 0 && columns % 4 == 0 && view.batch % 4 == 0 &&
         view.head % 4 == 0 && view.row % 4 == 0;
}

/// A matrix in global memory: rows of one head of one sequence.
template <typename T>
struct Matrix {
  T* data;  // (rows, columns)
  int64_t row_stride;
  int64_t columns;
  bool quads;
  const int64_t* places = nullptr;  // of the tile's rows from data on; null: row_stride apart
};

template <typename T>
__device__ __forceinline__ Matrix<T> head_matrix(const TensorView& view, int64_t b, int64_t row, int64_t head,
                                                 int64_t columns, bool quads) {
  return {static_cast<T*>(view.data) + b * view.batch + row * view.row + head * view.head, view.row, columns, quads};
}

/// Which rows of a tile exist.
struct RowRange {
  int begin, end;
  __device__ __forceinline__ bool holds(int row) const { return row >= begin && row < end; }
};

/// tile (kBlock, kWidth) = rows [row, row + kBlock), columns [column, column + kWidth) of `from`. What does not exist,
/// and rows that `alive` (if given) says nobody sees, become 0.
template <typename C>
__device__ __forceinline__ void load_tile(typename C::Acc* tile, const Matrix<typename C::Element>& from, int64_t row,
                                          int64_t column, RowRange rows, const uint8_t* alive = nullptr) {
  using Acc = typename C::Acc;
  using T = typename C::Element;
  const T* data = from.data + row * from.row_stride + column;
  const int columns = int(from.columns - column < C::kWidth ? from.columns - column : C::kWidth);
  const auto line = [&](int r) -> const T* {
    if constexpr (C::kCached) {
      if (from.places != nullptr) return from.data + from.places[r] + column;
    }
    return data + r * from.row_stride;
  };
  const auto exists = [&](int r, int c) {
    bool yes = rows.holds(r) && c < columns;
    if constexpr (C::kExtended) yes = yes && (alive == nullptr || alive[r] != 0 || alive[C::kBlock + r] != 0);
    return yes;
  };
  if (from.quads) {
    constexpr int kQuads = C::kWidth / 4;
#pragma unroll(C::kExtended ? 2 : 4)
    for (int i = int(threadIdx.x); i < C::kBlock * kQuads; i += kThreads) {
      const int r = i / kQuads, c = i % kQuads * 4;
      Quad<T> quad{};
      if (exists(r, c)) quad = *reinterpret_cast<const Quad<T>*>(line(r) + c);
      Quad<Acc> wide{{to_acc(quad.x[0]), to_acc(quad.x[1]), to_acc(quad.x[2]), to_acc(quad.x[3])}};
      *reinterpret_cast<Quad<Acc>*>(tile + r * C::kLd + c) = wide;
    }
  } else {
#pragma unroll 2
    for (int i = int(threadIdx.x); i < C::kBlock * C::kWidth; i += kThreads) {
      const int r = i / C::kWidth, c = i % C::kWidth;
      tile[r * C::kLd + c] = exists(r, c) ? Acc(to_acc(line(r)[c])) : Acc(0);
    }
  }
}

/// s += a b^T over `width` columns, a and b (kBlock, kWidth).
template <typename C>
__device__ __forceinline__ void add_scores(const typename C::Acc* a, const typename C::Acc* b, int64_t width,
                                           typename C::Acc (&s)[C::kRows][C::kCols]) {
  using Acc = typename C::Acc;
  a += thread_row() * C::kLd;
  b += thread_col() * C::kLd;
  const int end = int(width < C::kWidth ? width : C::kWidth);
#pragma unroll 1
  for (int k = 0; k < end; k += C::kVec) {
    Acc x[C::kRows][C::kVec];
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) load_vector(a + i * kThreadRows * C::kLd + k, x[i]);
#pragma unroll
    for (int j = 0; j < C::kCols; ++j) {
      Acc y[C::kVec];
      load_vector(b + j * kThreadCols * C::kLd + k, y);
#pragma unroll
      for (int v = 0; v < C::kVec; ++v) {
#pragma unroll
        for (int i = 0; i < C::kRows; ++i) s[i][j] += x[i][v] * y[v];
      }
    }
  }
}

/// o += p v, p (kBlock, kBlock), v (kBlock, kWidth).
template <typename C>
__device__ __forceinline__ void add_product(const typename C::Acc* p, const typename C::Acc* v,
                                            typename C::Acc (&o)[C::kRows][C::kOutCols]) {
  using Acc = typename C::Acc;
  p += thread_row() * C::kLdP;
  v += thread_col() * C::kOutVec;
#pragma unroll 1
  for (int k = 0; k < C::kBlock; k += C::kVec) {
    Acc x[C::kRows][C::kVec];
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) load_vector(p + i * kThreadRows * C::kLdP + k, x[i]);
#pragma unroll
    for (int n = 0; n < C::kVec; ++n) {
#pragma unroll
      for (int g = 0; g < C::kOutCols / C::kOutVec; ++g) {
        Acc y[C::kOutVec];
        load_vector(v + (k + n) * C::kLd + g * kThreadCols * C::kOutVec, y);
#pragma unroll
        for (int i = 0; i < C::kRows; ++i) {
#pragma unroll
          for (int u = 0; u < C::kOutVec; ++u) o[i][g * C::kOutVec + u] += x[i][n] * y[u];
        }
      }
    }
  }
}

/// tile (kBlock, kBlock) = s
template <typename C>
__device__ __forceinline__ void store_scores(typename C::Acc* tile, const typename C::Acc (&s)[C::kRows][C::kCols]) {
#pragma unroll
  for (int i = 0; i < C::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < C::kCols; ++j) {
      tile[(thread_row() + kThreadRows * i) * C::kLdP + thread_col() + kThreadCols * j] = s[i][j];
    }
  }
}

/// Rows [row, row + rows), columns [column, column + kWidth) of `to` = o * factor of its row.
template <typename C, typename Factor>
__device__ __forceinline__ void store_product(const Matrix<typename C::Element>& to, int64_t row, int64_t column,
                                              int rows, const typename C::Acc (&o)[C::kRows][C::kOutCols],
                                              Factor factor) {
  using T = typename C::Element;
#pragma unroll
  for (int i = 0; i < C::kRows; ++i) {
    const int r = thread_row() + kThreadRows * i;
    if (r >= rows) continue;
    T* line = to.data + (row + r) * to.row_stride;
    const auto f = factor(i);
#pragma unroll
    for (int g = 0; g < C::kOutCols / C::kOutVec; ++g) {
      const int64_t first = column + (g * kThreadCols + thread_col()) * C::kOutVec;
      if constexpr (C::kOutVec == 4) {
        if (to.quads) {
          if (first >= to.columns) continue;
          Quad<T> quad;
#pragma unroll
          for (int u = 0; u < 4; ++u) quad.x[u] = from_acc<T>(o[i][g * 4 + u] * f);
          *reinterpret_cast<Quad<T>*>(line + first) = quad;
          continue;
        }
      }
#pragma unroll
      for (int u = 0; u < C::kOutVec; ++u) {
        if (first + u < to.columns) line[first + u] = from_acc<T>(o[i][g * C::kOutVec + u] * f);
      }
    }
  }
}

template <typename Acc, int kN, int kM>
__device__ __forceinline__ void clear(Acc (&x)[kN][kM]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
#pragma unroll
    for (int j = 0; j < kM; ++j) x[i][j] = Acc(0);
  }
}

}  // namespace
}  // namespace flash_attn::cuda::universal
