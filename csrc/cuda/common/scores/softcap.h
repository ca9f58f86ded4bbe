// Scores bent by softcap: cap tanh(x), where x is a score over the cap.
#pragma once

#include "../ptx.h"

namespace flash_attn::cuda {

FLASH_ATTN_DEVICE float tanh_by_exp2(float x) {
  // 1 - 2 / (e^2x + 1): exact to 1e-7 absolutely, and odd where it matters; tanh.approx is off by 5e-4.
  const float e = fast_exp2(x * (2.f * 1.4426950408889634f));
  return 1.f - __fdividef(2.f, e + 1.f);
}

/// cap tanh(x) of |x| <= kLimit, to 1e-7 of the cap as well: x times a polynomial of its square. An exponential and a
/// reciprocal take a multiprocessor as long as sixteen products, this eight.
struct CapPolynomial {
  static constexpr float kLimit = 0.75f;
  static constexpr int kTerms = 6;
  float to_x, largest;  // q.k times the first is x; the largest |q.k|
  float term[kTerms];   // times the cap

  static CapPolynomial of(float to_x, float cap) {
    // The least largest error, relative to tanh(x) / x, of polynomials of this degree.
    constexpr double kTanh[kTerms] = {0.99999997325, -0.3333297963, 0.13325687918,
                                      -0.0533584461, 0.01961130831, -0.00473641241};
    CapPolynomial polynomial{to_x, kLimit / to_x, {}};
    for (int i = 0; i < kTerms; ++i) polynomial.term[i] = float(kTanh[i] * cap);
    return polynomial;
  }

  FLASH_ATTN_DEVICE float operator()(float product) const {
    const float x = product * to_x, square = x * x;
    float sum = term[kTerms - 1];
#pragma unroll
    for (int i = kTerms - 2; i >= 0; --i) sum = fmaf(sum, square, term[i]);
    return sum * x;
  }
};

}  // namespace flash_attn::cuda
