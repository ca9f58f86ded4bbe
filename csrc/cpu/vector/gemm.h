// C (+)= A B on packed tiles, the one matrix product all passes are made of. B and C lie along vectors, A is read one
// element at a time and broadcast, so A needs no packing and may lie either way round.
#pragma once

#include "exponentials.h"
#include "simd.h"

#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace flash_attn::cpu {
namespace {  // see isa.h

/// How products are formed: `Operand` is what one multiplication takes, kPack neighbouring numbers of the sum's index.
template <typename T>
struct Plain {
  using Acc = T;
  using Operand = T;
  static constexpr int kPack = 1;
  static FLASH_ATTN_INLINE Vec<Acc> multiply_add(Vec<Acc> c, Operand a, Vec<Operand> b) { return a * b + c; }
  static FLASH_ATTN_INLINE Vec<Acc> multiply_add(Vec<Acc> c, Vec<Operand> a, Vec<Operand> b) { return a * b + c; }
};

#if defined(__AVX512BF16__)
/// Pairs of bfloat16 in a 32-bit word, the even one low, summed in float.
struct BFloat16Pairs {
  using Acc = float;
  using Operand = uint32_t;
  static constexpr int kPack = 2;
  static FLASH_ATTN_INLINE Vec<Acc> multiply_add(Vec<Acc> c, Operand a, Vec<Operand> b) {
    return _mm512_dpbf16_ps(c, bit_cast<__m512bh>(_mm512_set1_epi32(int(a))), bit_cast<__m512bh>(b));
  }
  static FLASH_ATTN_INLINE Vec<Acc> multiply_add(Vec<Acc> c, Vec<Operand> a, Vec<Operand> b) {
    return _mm512_dpbf16_ps(c, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
  }
};
#endif

/// Whether products are formed in the tile registers of AMX; rows of C at a time, and most vectors of a row: what fits
/// the registers with the vectors of B.
#if defined(__AMX_BF16__)
constexpr bool kOnTiles = true;
constexpr int kGemmRows = kTileRows;
#else
constexpr bool kOnTiles = false;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kGemmRows = 8;
#else
constexpr int kGemmRows = 4;
#endif
#endif
constexpr int kGemmVectors = 3;

/// A tile's columns are padded to a multiple of this: they are lanes of one product and may be rows of another.
template <typename T>
constexpr int kPadding = kLanes<T> > kGemmRows ? kLanes<T> : kGemmRows;

/// A as it lies in memory: (row, depth) or (depth, row). AMX reads the first; of the second it makes that each time.
enum class Layout { kRowMajor, kDepthMajor };

#if !defined(__AMX_BF16__)
/// What a task needs to hold while it forms products, and exponentials; here nothing.
struct MatrixUnit {
  MatrixUnit() {}
};
struct FlushToZero {
  FlushToZero() {}
};
#endif

/// Longest sum in one go. Sums of such sums have the rounding errors of two short ones.
constexpr int64_t kGemmDepth = 48;

template <typename Arithmetic, Layout kLayout, int kVectors>
void gemm_panel(int64_t rows, int64_t depth, const typename Arithmetic::Operand* a, int64_t lda,
                const typename Arithmetic::Operand* b, int64_t ldb, typename Arithmetic::Acc* c, int64_t ldc,
                bool accumulate) {
  using Acc = typename Arithmetic::Acc;
  using Operand = typename Arithmetic::Operand;
  constexpr int W = kLanes<Acc>;
  for (int64_t row = 0; row < rows; row += kGemmRows) {
    Vec<Acc> sum[kGemmRows][kVectors];
    for (int i = 0; i < kGemmRows; ++i) {
      for (int j = 0; j < kVectors; ++j) sum[i][j] = Vec<Acc>{};
    }
    const Operand* a_row = kLayout == Layout::kRowMajor ? a + row * lda : a + row;
    const Operand* b_k = b;
    for (int64_t k = 0; k < depth; ++k) {
      Vec<Operand> b_vector[kVectors];
      for (int j = 0; j < kVectors; ++j) b_vector[j] = load_vector<Vec<Operand>>(b_k + j * W);
      for (int i = 0; i < kGemmRows; ++i) {
        const Operand a_element = kLayout == Layout::kRowMajor ? a_row[i * lda] : a_row[i];
        for (int j = 0; j < kVectors; ++j) {
          sum[i][j] = Arithmetic::multiply_add(sum[i][j], a_element, b_vector[j]);
        }
      }
      a_row += kLayout == Layout::kRowMajor ? 1 : lda;
      b_k += ldb;
    }
    for (int i = 0; i < kGemmRows; ++i) {
      for (int j = 0; j < kVectors; ++j) {
        Acc* to = c + (row + i) * ldc + j * W;
        store<Acc>(to, accumulate ? load<Acc>(to) + sum[i][j] : sum[i][j]);
      }
    }
  }
}

/// All rows of kVectors vectors of columns, the sum in equal parts of at most kGemmDepth.
template <typename Arithmetic, Layout kLayout, int kVectors>
FLASH_ATTN_INLINE void gemm_columns(int64_t rows, int64_t depth, const typename Arithmetic::Operand* a, int64_t lda,
                                    const typename Arithmetic::Operand* b, int64_t ldb, typename Arithmetic::Acc* c,
                                    int64_t ldc, bool accumulate) {
  const int64_t parts = depth > kGemmDepth ? (depth + kGemmDepth - 1) / kGemmDepth : 1;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = depth * part / parts, end = depth * (part + 1) / parts;
    gemm_panel<Arithmetic, kLayout, kVectors>(rows, end - begin, a + begin * (kLayout == Layout::kRowMajor ? 1 : lda),
                                              lda, b + begin * ldb, ldb, c, ldc, accumulate || part > 0);
  }
}

/// c (rows, columns) (+)= A (rows, depth) b (depth, columns). `columns` is a multiple of the vector's lanes; rows are
/// rounded up to kGemmRows, so A and c must have that many. `depth` counts operands. The caller holds a MatrixUnit.
template <typename Arithmetic, Layout kLayout>
void gemm(int64_t rows, int64_t columns, int64_t depth, const typename Arithmetic::Operand* a, int64_t lda,
          const typename Arithmetic::Operand* b, int64_t ldb, typename Arithmetic::Acc* c, int64_t ldc,
          bool accumulate) {
#if defined(__AMX_BF16__)
  gemm_on_tiles<kLayout == Layout::kDepthMajor>(rows, columns, depth, a, lda, b, ldb, c, ldc, accumulate);
#else
  constexpr int W = kLanes<typename Arithmetic::Acc>;
  for (int64_t column = 0; column < columns;) {
    const int64_t left = (columns - column) / W;
    if (left == kGemmVectors || left > kGemmVectors + 1) {
      gemm_columns<Arithmetic, kLayout, kGemmVectors>(rows, depth, a, lda, b + column, ldb, c + column, ldc,
                                                      accumulate);
      column += kGemmVectors * W;
    } else if (left >= 2) {  // four are two and two, not three and one
      gemm_columns<Arithmetic, kLayout, 2>(rows, depth, a, lda, b + column, ldb, c + column, ldc, accumulate);
      column += 2 * W;
    } else {
      gemm_columns<Arithmetic, kLayout, 1>(rows, depth, a, lda, b + column, ldb, c + column, ldc, accumulate);
      column += W;
    }
  }
#endif
}

}  // namespace
}  // namespace flash_attn::cpu
