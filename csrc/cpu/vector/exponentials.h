// Exponentials, and what is made of them.
#pragma once

#include "simd.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

// 2^y = 2^n * 2^f with n = round(y), f in [-0.5, 0.5], and 2^f = 1 + f * exp2_tail(f).

template <typename T>
struct Constants;
template <>
struct Constants<float> {
  static constexpr float kRound = 0x1.8p23f;  // x + kRound has round(x) in its low bits
  static constexpr float kMinExponent = -126.0f, kMaxExponent = 128.0f;
  static constexpr int kMantissaBits = 23, kExponentBias = 127;
  static constexpr float kTanhLimit = 10.0f;  // tanh(x) rounds to 1 beyond
};
template <>
struct Constants<double> {
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kMinExponent = -1022.0, kMaxExponent = 1024.0;
  static constexpr int kMantissaBits = 52, kExponentBias = 1023;
  static constexpr double kTanhLimit = 20.0;
};

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

/// (2^f - 1) / f, interpolated at Chebyshev nodes: 2^f is off by 5e-9 of itself.
FLASH_ATTN_INLINE Vec<float> exp2_tail(Vec<float> f) {
  Vec<float> y = f * 0.000154031529f + 0.00133908634f;
  y = y * f + 0.00961808256f;
  y = y * f + 0.0555035711f;
  y = y * f + 0.240226508f;
  return y * f + 0.693147188f;
}

/// The same to 1e-17.
FLASH_ATTN_INLINE Vec<double> exp2_tail(Vec<double> f) {
  Vec<double> y = f * 4.4549605981865183938e-10 + 7.0725859692492236999e-9;
  y = y * f + 1.0178062445845773521e-7;
  y = y * f + 1.3215442587921689653e-6;
  y = y * f + 0.000015252733829836118394;
  y = y * f + 0.00015403530441736050155;
  y = y * f + 0.001333355814641693531;
  y = y * f + 0.0096181291076088885273;
  y = y * f + 0.055504108664821594339;
  y = y * f + 0.2402265069591009822;
  return y * f + 0.69314718055994530942;
}

/// As exp2_tail, for what is rounded to bfloat16, which has 256 steps between powers of 2: 2^f is off by 7e-6 of
/// itself.
FLASH_ATTN_INLINE Vec<float> exp2_short_tail(Vec<float> f) {
  Vec<float> y = f * 0.00965671029f + 0.0558382829f;
  y = y * f + 0.240225301f;
  return y * f + 0.693136734f;
}

/// 2^(x * scale), the product unrounded. 0 where the result would not be a normal number, also for x = -inf; NaN for
/// NaN. With kShort it is to be rounded to bfloat16.
template <typename T, bool kShort = false>
FLASH_ATTN_INLINE Vec<T> exp2(Vec<T> x, T scale) {
  using C = Constants<T>;
  const Vec<T> shifted = x * scale + C::kRound;
  const Vec<T> n = shifted - C::kRound;
  const Vec<T> f = x * scale - n;
  Vec<T> tail;
  if constexpr (kShort) {
    tail = exp2_short_tail(f);
  } else {
    tail = exp2_tail(f);
  }
  const Vec<T> power = f * tail + T(1);
#if defined(__AVX512F__)
  constexpr int kNotLess = _CMP_NLT_UQ;  // NaN is not
  if constexpr (sizeof(T) == 4) {
    const __mmask16 normal = _mm512_cmp_ps_mask(shifted, broadcast<T>(C::kRound + C::kMinExponent), kNotLess);
    return _mm512_maskz_scalef_ps(normal, power, n);
  } else {
    const __mmask8 normal = _mm512_cmp_pd_mask(shifted, broadcast<T>(C::kRound + C::kMinExponent), kNotLess);
    return _mm512_maskz_scalef_pd(normal, power, n);
  }
#else
  const Vec<T> scaled =
      bit_cast<Vec<T>>(bit_cast<IntVec<T>>(power) + (bit_cast<IntVec<T>>(shifted) << C::kMantissaBits));
  const Vec<T> y = shifted < C::kRound + C::kMaxExponent ? scaled : shifted * T(__builtin_huge_val());
  return shifted < C::kRound + C::kMinExponent ? Vec<T>{} : y;
#endif
}

#if defined(__AMX_BF16__)
/// 2^y for what is rounded to bfloat16: off by 9e-5 of itself. It has to be called under a FlushToZero: of numbers that
/// are not normal a processor makes results a hundred times as slowly.
FLASH_ATTN_INLINE Vec<float> exp2_short(Vec<float> y) {
  constexpr __mmask16 kAll(-1);
  const Vec<float> f = _mm512_maskz_reduce_ps(kAll, y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // y - floor(y)
  const Vec<float> power = ((f * 0.0770671974f + 0.227644822f) * f + 0.695116825f) * f + 1.0f;
  return _mm512_maskz_scalef_ps(kAll, power, y);  // which takes floor(y) itself
}

/// Pairs of bfloat16, `even` in the low halves, of numbers that are not negative: rounded half up, and a NaN may become
/// anything. It takes less than the instruction for it, and than interleaving after that.
FLASH_ATTN_INLINE Words round_to_pairs(Vec<float> even, Vec<float> odd) {
  return blend_halves((bit_cast<Words>(even) + 0x8000u) >> 16, bit_cast<Words>(odd) + 0x8000u);
}

/// From here to the end of the scope the thread's results that are not normal become 0, as AMX's do.
class FlushToZero {
 public:
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before_); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  unsigned before_;
};
#endif

/// tanh(x) to a few units in the last place, also near 0: (e^2x - 1) / (e^2x + 1) with e^2x - 1 free of cancellation.
template <typename T>
FLASH_ATTN_INLINE Vec<T> tanh(Vec<T> x) {
  using C = Constants<T>;
  const Vec<T> magnitude = x < T(0) ? -x : x;
  const Vec<T> y = (magnitude > C::kTanhLimit ? broadcast<T>(C::kTanhLimit) : magnitude) * T(2 * kLog2E);
  const Vec<T> shifted = y + C::kRound;
  const Vec<T> f = y - (shifted - C::kRound);
  const Vec<T> power =
      bit_cast<Vec<T>>((bit_cast<IntVec<T>>(shifted) << C::kMantissaBits) + bit_cast<IntVec<T>>(broadcast<T>(T(1))));
  const Vec<T> expm1 = f * exp2_tail(f) * power + (power - T(1));
  const Vec<T> t = expm1 / (expm1 + T(2));
  return x != x ? x : (x < T(0) ? -t : t);
}

/// first + log(x) for positive normal x, infinity and NaN, the logarithm to 3e-8.
FLASH_ATTN_INLINE Vec<float> add_log(const double (&first)[kLanes<float>], Vec<float> x) {
  // x = 2^n * m with m from sqrt(1/2) to sqrt(2), and log(m) = 2 atanh((m - 1) / (m + 1)).
  constexpr uint32_t kRootOfHalf = 0x3f3504f3u;
  const Words bits = bit_cast<Words>(x) - kRootOfHalf;
  const Vec<float> m = bit_cast<Vec<float>>((bits & 0x007fffffu) + kRootOfHalf);
  const IntVec<float> n = bit_cast<IntVec<float>>(bits) >> 23;
  const Vec<float> s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const Vec<float> tail = ((z * (1.0f / 9) + 1.0f / 7) * z + 1.0f / 5) * z + 1.0f / 3;
  float log[kLanes<float>];
  int32_t exponent[kLanes<float>];
  store<float>(log, x < __builtin_inff() ? 2.0f * (s * z * tail + s) : x);
  store_vector(exponent, n);
  for (int i = 0; i < kLanes<float>; ++i) log[i] = float(first[i] + (double(exponent[i]) * kLn2 + double(log[i])));
  return load<float>(log);
}

FLASH_ATTN_INLINE Vec<double> add_log(const double (&first)[kLanes<double>], Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = first[i] + __builtin_log(x[i]);
  return x;
}

}  // namespace
}  // namespace flash_attn::cpu
