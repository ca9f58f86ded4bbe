// Vectors by compiler extension: one source for every instruction set, at the width of FLASH_ATTN_ISA. Intrinsics only
// where the extension has no word for an instruction; each has a plain version beside it. (Those of AVX-512 are called
// with a full mask: gcc 12 warns of its own headers otherwise.)
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FLASH_ATTN_INLINE inline __attribute__((always_inline))

namespace flash_attn::cpu {
namespace {  // see isa.h

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T, int kBytes = kVectorBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

/// Integers as wide as T: what comparisons give and exponents are made of.
template <typename T>
struct Integer;
template <>
struct Integer<float> {
  using type = int32_t;
};
template <>
struct Integer<double> {
  using type = int64_t;
};
template <typename T>
using IntVec = Vec<typename Integer<T>::type>;

/// Storage types that C++17 has no arithmetic for.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
FLASH_ATTN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 keeps the sign of zero
}

template <typename V>
FLASH_ATTN_INLINE V load_vector(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V>
FLASH_ATTN_INLINE void store_vector(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <typename To, typename From>
FLASH_ATTN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

/// b where one is NaN
template <typename T>
FLASH_ATTN_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_max_ps(__mmask16(-1), a, b);
  } else {
    return _mm512_maskz_max_pd(__mmask8(-1), a, b);
  }
#else
  return a > b ? a : b;
#endif
}

/// Lane numbers 0, 1, 2, ...
template <typename T>
FLASH_ATTN_INLINE Vec<T> lane_numbers() {
  Vec<T> v{};
  for (int i = 0; i < kLanes<T>; ++i) v[i] = T(i);
  return v;
}

// Conversions. `load` gives kLanes<T> numbers as T from their storage type, `store` rounds to nearest even.

template <typename T>
FLASH_ATTN_INLINE Vec<T> load(const T* p) {
  return load_vector<Vec<T>>(p);
}

template <typename T>
FLASH_ATTN_INLINE void store(T* p, Vec<T> v) {
  store_vector(p, v);
}

using HalfWords = VectorOf<uint16_t, kVectorBytes / 2>::type;  // as many as a vector has floats
using Words = Vec<uint32_t>;

// gcc 12 takes wide conversions of integers apart into scalars.
FLASH_ATTN_INLINE Words widen(HalfWords v) {
#if defined(__AVX512F__)
  return bit_cast<Words>(_mm512_maskz_cvtepu16_epi32(__mmask16(-1), bit_cast<__m256i>(v)));
#else
  return __builtin_convertvector(v, Words);
#endif
}

FLASH_ATTN_INLINE HalfWords narrow(Words v) {
#if defined(__AVX512F__)
  return bit_cast<HalfWords>(_mm512_maskz_cvtepi32_epi16(__mmask16(-1), bit_cast<__m512i>(v)));
#else
  return __builtin_convertvector(v, HalfWords);
#endif
}

/// kLanes<T> bytes, each as an integer lane.
template <typename T>
FLASH_ATTN_INLINE IntVec<T> load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return bit_cast<IntVec<T>>(_mm512_maskz_cvtepu8_epi32(__mmask16(-1), load_vector<__m128i>(p)));
  } else {
    return bit_cast<IntVec<T>>(
        _mm512_maskz_cvtepu8_epi64(__mmask8(-1), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
#else
  return __builtin_convertvector(load_vector<typename VectorOf<uint8_t, kLanes<T>>::type>(p), IntVec<T>);
#endif
}

/// The low byte of every lane.
FLASH_ATTN_INLINE void store_bytes(uint8_t* p, Words v) {
#if defined(__AVX512F__)
  store_vector(p, _mm512_maskz_cvtepi32_epi8(__mmask16(-1), bit_cast<__m512i>(v)));
#else
  using Bytes = VectorOf<uint8_t, kLanes<uint32_t>>::type;
  store_vector(p, __builtin_convertvector(v, Bytes));
#endif
}

template <typename T>
FLASH_ATTN_INLINE Vec<float> load(const BFloat16* p) {
  return bit_cast<Vec<float>>(widen(load_vector<HalfWords>(p)) << 16);
}

FLASH_ATTN_INLINE Words round_to_bfloat16(Vec<float> v) {
  const Words bits = bit_cast<Words>(v);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? rounded : (bits >> 16) | 0x40u;  // a NaN stays one
}

template <typename T>
FLASH_ATTN_INLINE void store(BFloat16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  store_vector(p, _mm512_maskz_cvtneps_pbh(__mmask16(-1), v));
#else
  store_vector(p, narrow(round_to_bfloat16(v)));
#endif
}

#if defined(__AVX512F__)
/// The low half of each word of `low`, and the high half of `high`.
FLASH_ATTN_INLINE Words blend_halves(Words low, Words high) {
  return bit_cast<Words>(_mm512_mask_blend_epi16(0xaaaaaaaau, bit_cast<__m512i>(low), bit_cast<__m512i>(high)));
}
#endif

#if defined(__AVX512BF16__)
using HalfWordPairs = Vec<uint16_t>;

/// The lanes of `first` as bfloat16, then those of `second`.
FLASH_ATTN_INLINE HalfWordPairs round_to_bfloat16(Vec<float> first, Vec<float> second) {
  return bit_cast<HalfWordPairs>(_mm512_cvtne2ps_pbh(second, first));
}

FLASH_ATTN_INLINE HalfWords low_half(HalfWordPairs v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

FLASH_ATTN_INLINE HalfWords high_half(HalfWordPairs v) {
  return __builtin_shufflevector(v, v, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
}

/// From that: a word a lane, `first` in its low half.
FLASH_ATTN_INLINE Words interleave(HalfWordPairs v) {
  return bit_cast<Words>(__builtin_shufflevector(v, v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                                 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}
#endif

template <typename T>
FLASH_ATTN_INLINE Vec<float> load(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(__mmask16(-1), load_vector<__m256i>(p));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(load_vector<__m128i>(p));
#else
  const Words half = widen(load_vector<HalfWords>(p));
  const Words magnitude = (half & 0x7fffu) << 13;
  // The exponent moves from bias 15 to 127 by a product, which also makes subnormal numbers right.
  const Words finite = bit_cast<Words>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
  const Words special = magnitude | 0x7f800000u;
  return bit_cast<Vec<float>>((magnitude >= 0x0f800000u ? special : finite) | ((half & 0x8000u) << 16));
#endif
}

template <typename T>
FLASH_ATTN_INLINE void store(Float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  store_vector(p, _mm512_maskz_cvtps_ph(__mmask16(-1), v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  store_vector(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Words bits = bit_cast<Words>(v);
  const Words magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the sum with 0.5 rounds to steps of 2^-24, what a subnormal number counts.
  const Words tiny = bit_cast<Words>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Words large = magnitude > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
  const Words half = magnitude >= 0x47800000u ? large : (magnitude < 0x38800000u ? tiny : normal);
  store_vector(p, narrow(half | ((bits >> 16) & 0x8000u)));
#endif
}

/// Elements [0, count) of a row, count < kSize; the others are 0. Nothing beyond the row is touched.
template <int kSize, typename Storage>
FLASH_ATTN_INLINE void copy_partial(Storage* to, const Storage* from, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (kSize * sizeof(Storage) == 64 && sizeof(Storage) == 8) {
    store_vector(to, _mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), from));
  } else if constexpr (kSize * sizeof(Storage) == 64 && sizeof(Storage) == 4) {
    store_vector(to, _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from));
  } else if constexpr (kSize * sizeof(Storage) == 64 && sizeof(Storage) == 2) {
    store_vector(to, _mm512_maskz_loadu_epi16(__mmask32((1u << count) - 1), from));
  } else if constexpr (kSize * sizeof(Storage) == 32 && sizeof(Storage) == 2) {
    store_vector(to, _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from));
  } else
#endif
  {
    for (int i = 0; i < kSize; ++i) to[i] = i < count ? from[i] : Storage{};
  }
}

template <typename T, typename Storage>
FLASH_ATTN_INLINE Vec<T> load_partial(const Storage* p, int64_t count) {
  Storage lanes[kLanes<T>];
  copy_partial<kLanes<T>>(lanes, p, count);
  return load<T>(lanes);
}

template <typename T, typename Storage>
FLASH_ATTN_INLINE void store_partial(Storage* p, Vec<T> v, int64_t count) {
  Storage lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

}  // namespace
}  // namespace flash_attn::cpu
