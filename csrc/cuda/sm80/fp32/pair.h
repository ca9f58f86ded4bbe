// Numbers as pairs of fp16 in fragments, and their products.
#pragma once

#include "../mma.h"

namespace flash_attn::cuda::sm80::fp32 {

SM80_DEVICE float low_of(uint32_t pair) { return __half2float(__ushort_as_half(uint16_t(pair))); }
SM80_DEVICE float high_of(uint32_t pair) { return __half2float(__ushort_as_half(uint16_t(pair >> 16))); }

/// Two numbers, whose magnitude is below 2^16, as two pairs: `high` and `low` hold a half of each.
SM80_DEVICE void split_pair(float x, float y, uint32_t& high, uint32_t& low) {
  high = pack<__half>(x, y);
  low = pack<__half>(x - low_of(high), y - high_of(high));
}

constexpr float kPScale = 0x1p15f;  // of P as pairs: what is above 2^-18 keeps 23 bits

/// An A fragment, or what ldmatrix brings for two B fragments.
struct PairFragment {
  uint32_t high[4], low[4];
};

/// sum += a b and rest += what the low halves add: small numbers have a sum of their own, from which the alignment to
/// a large one cuts nothing off. kReduced: of the high halves alone.
template <bool kReduced>
SM80_DEVICE void mma_pair(float (&sum)[4], float (&rest)[4], const PairFragment& a, const PairFragment& b, int half) {
  if constexpr (!kReduced) mma_m16n8k16<__half>(rest, a.low, b.high[2 * half], b.high[2 * half + 1]);
  mma_m16n8k16<__half>(sum, a.high, b.high[2 * half], b.high[2 * half + 1]);
  if constexpr (!kReduced) mma_m16n8k16<__half>(rest, a.high, b.low[2 * half], b.low[2 * half + 1]);
}

template <int kM, int kN>
SM80_DEVICE void add(float (&total)[kM][kN][4], const float (&sum)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[m][n][i] += sum[m][n][i];
}

}  // namespace flash_attn::cuda::sm80::fp32
