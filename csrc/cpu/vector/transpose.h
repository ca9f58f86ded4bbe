// Square transpositions in registers.
#pragma once

#include "simd.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

// kLanes x kLanes elements take log2(kLanes) rounds of the perfect shuffle.

#define FLASH_ATTN_ZIP2(a, b, lo, hi)             \
  (lo) = __builtin_shufflevector((a), (b), 0, 2); \
  (hi) = __builtin_shufflevector((a), (b), 1, 3)
#define FLASH_ATTN_ZIP4(a, b, lo, hi)                   \
  (lo) = __builtin_shufflevector((a), (b), 0, 4, 1, 5); \
  (hi) = __builtin_shufflevector((a), (b), 2, 6, 3, 7)
#define FLASH_ATTN_ZIP8(a, b, lo, hi)                                 \
  (lo) = __builtin_shufflevector((a), (b), 0, 8, 1, 9, 2, 10, 3, 11); \
  (hi) = __builtin_shufflevector((a), (b), 4, 12, 5, 13, 6, 14, 7, 15)
#define FLASH_ATTN_ZIP16(a, b, lo, hi)                                                              \
  (lo) = __builtin_shufflevector((a), (b), 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); \
  (hi) = __builtin_shufflevector((a), (b), 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

template <typename T>
FLASH_ATTN_INLINE void zip(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high) {
  if constexpr (kLanes<T> == 2) {
    FLASH_ATTN_ZIP2(a, b, low, high);
  } else if constexpr (kLanes<T> == 4) {
    FLASH_ATTN_ZIP4(a, b, low, high);
  } else if constexpr (kLanes<T> == 8) {
    FLASH_ATTN_ZIP8(a, b, low, high);
  } else {
    FLASH_ATTN_ZIP16(a, b, low, high);
  }
}

/// r[i][j] <-> r[j][i]
template <typename T>
FLASH_ATTN_INLINE void transpose(Vec<T> (&r)[kLanes<T>]) {
  constexpr int kHalf = kLanes<T> / 2;
  for (int round = 1; round < kLanes<T>; round *= 2) {
    Vec<T> next[kLanes<T>];
    for (int i = 0; i < kHalf; ++i) zip<T>(r[i], r[i + kHalf], next[2 * i], next[2 * i + 1]);
    for (int i = 0; i < kLanes<T>; ++i) r[i] = next[i];
  }
}

/// Whether there is load_transposed for vectors of T.
#if defined(__AVX512F__)
template <typename T>
constexpr bool kLoadsTransposed = sizeof(T) == 4;

#define FLASH_ATTN_UNPACK_WORDS(first, a, b)                                                                     \
  __builtin_shufflevector((a), (b), (first), (first) + 16, (first) + 1, (first) + 17, (first) + 4, (first) + 20, \
                          (first) + 5, (first) + 21, (first) + 8, (first) + 24, (first) + 9, (first) + 25,       \
                          (first) + 12, (first) + 28, (first) + 13, (first) + 29)
#define FLASH_ATTN_UNPACK_PAIRS(first, a, b)                                                                    \
  __builtin_shufflevector((a), (b), (first), (first) + 1, (first) + 16, (first) + 17, (first) + 4, (first) + 5, \
                          (first) + 20, (first) + 21, (first) + 8, (first) + 9, (first) + 24, (first) + 25,     \
                          (first) + 12, (first) + 13, (first) + 28, (first) + 29)

/// Lane i of r[j] is word j of row i: 16 rows of 16 words in memory, `stride` bytes apart. Quarters of rows are put
/// together as they are loaded, which leaves half of the shuffles, of which a clock has but one.
FLASH_ATTN_INLINE void load_transposed(const void* rows, size_t stride, Words (&r)[16]) {
  const char* const from = static_cast<const char*>(rows);
  for (int quarter = 0; quarter < 4; ++quarter) {
    Words rows_of[4];  // i: quarters of the rows i, i + 4, i + 8, i + 12
    for (int i = 0; i < 4; ++i) {
      const char* p = from + i * stride + quarter * 16;
      constexpr __mmask16 kAll(-1);
      __m512i row = _mm512_maskz_inserti32x4(kAll, __m512i{}, load_vector<__m128i>(p), 0);
      row = _mm512_maskz_inserti32x4(kAll, row, load_vector<__m128i>(p + 4 * stride), 1);
      row = _mm512_maskz_inserti32x4(kAll, row, load_vector<__m128i>(p + 8 * stride), 2);
      row = _mm512_maskz_inserti32x4(kAll, row, load_vector<__m128i>(p + 12 * stride), 3);
      rows_of[i] = bit_cast<Words>(row);
    }
    const Words low01 = FLASH_ATTN_UNPACK_WORDS(0, rows_of[0], rows_of[1]);
    const Words high01 = FLASH_ATTN_UNPACK_WORDS(2, rows_of[0], rows_of[1]);
    const Words low23 = FLASH_ATTN_UNPACK_WORDS(0, rows_of[2], rows_of[3]);
    const Words high23 = FLASH_ATTN_UNPACK_WORDS(2, rows_of[2], rows_of[3]);
    r[4 * quarter] = FLASH_ATTN_UNPACK_PAIRS(0, low01, low23);
    r[4 * quarter + 1] = FLASH_ATTN_UNPACK_PAIRS(2, low01, low23);
    r[4 * quarter + 2] = FLASH_ATTN_UNPACK_PAIRS(0, high01, high23);
    r[4 * quarter + 3] = FLASH_ATTN_UNPACK_PAIRS(2, high01, high23);
  }
}

FLASH_ATTN_INLINE void load_transposed(const void* rows, size_t stride, Vec<float> (&r)[16]) {
  Words words[16];
  load_transposed(rows, stride, words);
  for (int i = 0; i < 16; ++i) r[i] = bit_cast<Vec<float>>(words[i]);
}
#undef FLASH_ATTN_UNPACK_WORDS
#undef FLASH_ATTN_UNPACK_PAIRS
#else
template <typename T>
constexpr bool kLoadsTransposed = false;
#endif

/// Lane i is the sum of the lanes of r[i].
template <typename T>
FLASH_ATTN_INLINE Vec<T> sum_lanes(Vec<T> (&r)[kLanes<T>]) {
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      Vec<T> low, high;
      zip<T>(r[i], r[i + half], low, high);
      r[i] = low + high;
    }
  }
  return r[0];
}

/// 16 x 16 bytes: dst[j][i] = src[i][j] for i < rows and j < columns; 0 for the other i. Strides in bytes.
FLASH_ATTN_INLINE void transpose_bytes(const uint8_t* src, int64_t src_stride, int64_t rows, int64_t columns,
                                       uint8_t* dst, int64_t dst_stride) {
  using Bytes = VectorOf<uint8_t, 16>::type;
  Bytes r[16];
  for (int i = 0; i < 16; ++i) {
    r[i] = Bytes{};
    if (i >= rows) continue;
    if (columns >= 16) {
      r[i] = load_vector<Bytes>(src + i * src_stride);
    } else {
      for (int64_t j = 0; j < columns; ++j) r[i][j] = src[i * src_stride + j];
    }
  }
  for (int round = 0; round < 4; ++round) {
    Bytes next[16];
    for (int i = 0; i < 8; ++i) {
      FLASH_ATTN_ZIP16(r[i], r[i + 8], next[2 * i], next[2 * i + 1]);
    }
    for (int i = 0; i < 16; ++i) r[i] = next[i];
  }
  for (int64_t j = 0; j < 16 && j < columns; ++j) store_vector(dst + j * dst_stride, r[j]);
}

}  // namespace
}  // namespace flash_attn::cpu
