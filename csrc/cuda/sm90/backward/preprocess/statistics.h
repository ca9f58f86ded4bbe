// lse and delta enter the products S^T = K Q^T and dP^T = V dO^T as one more step of sixteen k, so that P = exp(scale *
// S') and dS = P * dP' need no load, no register and no subtraction for them.
//
// A query row has 16 bytes, eight elements of the input type: -lse / scale as a sum of three (high, mid, low) and a
// zero, then the same of -delta. The other operand holds the weights of the three, in its first four columns of k for S
// and in the next four for dP. Both lie without swizzle in core matrices of eight rows of 16 bytes.
#pragma once

#include <cmath>

#include "../../../common/scores/softmax.h"
#include "../../hopper/tma.h"
#include "../../hopper/wgmma.h"

namespace flash_attn::cuda::sm90::backward {

/// What the three elements are multiplied by: together they hold a float, in fp16 one up to 2^27 to 2^-36 of it. Rows
/// of larger scores have no P, and no gradients, in fp16.
template <typename Element>
struct StatisticWeights {
  static constexpr float kHigh = 1.f, kMid = 1.f, kLow = 1.f, kLargest = 0x1p120f;
};
template <>
struct StatisticWeights<__half> {
  static constexpr float kHigh = 32768.f, kMid = 1.f, kLow = 1.f / 4096.f, kLargest = 0x1p27f;
};

/// In place of -lse / scale: P = 0. Large enough for the smallest scale that the planner accepts, 1e-4; a power of two
/// that fp16's three elements hold.
constexpr float kNoProbability = -0x1p27f;

constexpr int kStatisticBytes = 16;  // of a query row

template <typename Element>
FLASH_ATTN_DEVICE float round_to(float x) {
  return static_cast<float>(static_cast<Element>(x));
}

template <typename Element>
FLASH_ATTN_DEVICE uint2 split_statistic(float x) {
  using Weights = StatisticWeights<Element>;
  const float high = round_to<Element>(x * (1.f / Weights::kHigh));
  x -= high * Weights::kHigh;
  const float mid = round_to<Element>(x);
  x -= mid;
  return {pack<Element>(high, mid), pack<Element>(x * (1.f / Weights::kLow), 0.f)};
}

/// lse / scale. Of a very large lse nothing is left but the row's largest score, scale times a q.k, rounded: then the
/// largest q.k of which that may have come.
FLASH_ATTN_DEVICE float in_units_of_products(float lse, float scale, float inverse_scale) {
  float x = lse * inverse_scale;
  if (!(fabsf(lse) > kLargestInLog2)) return x;
  const int up = x > 0.f ? 1 : -1;
  x = __int_as_float(__float_as_int(x) + 2 * up);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (x * scale > lse) x = __int_as_float(__float_as_int(x) - up);
  }
  return x;
}

/// The 16 bytes of a row with this lse (-infinity: it sees nothing), and delta less the gradient of lse. inverse_scale:
/// 1 / scale.
template <typename Element>
FLASH_ATTN_DEVICE uint4 row_statistics(float lse, float delta, float scale, float inverse_scale) {
  constexpr float kLargest = StatisticWeights<Element>::kLargest;
  float minus_lse = kNoProbability, minus_delta = 0.f;
  if (lse != -INFINITY) {
    const float x = -in_units_of_products(lse, scale, inverse_scale);
    minus_lse = x < -kLargest ? -kLargest : x > kLargest ? kLargest : x;  // NaN stays
    minus_delta = -delta;
  }
  const uint2 first = split_statistic<Element>(minus_lse), second = split_statistic<Element>(minus_delta);
  return {first.x, first.y, second.x, second.y};
}

/// `sum` and the products of eight elements each.
template <typename Element>
FLASH_ATTN_DEVICE float dot8(const uint4& x, const uint4& y, float sum) {
  const Element* const a = reinterpret_cast<const Element*>(&x);
  const Element* const b = reinterpret_cast<const Element*>(&y);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(static_cast<float>(a[i]), static_cast<float>(b[i]), sum);
  return sum;
}

/// The A operand: core matrices with weights for S, with weights for dP, and zeros. Every group of eight rows reads the
/// same ones, the second half of k the zeros.
struct StatisticOperand {
  static constexpr int kCoreBytes = 128, kCoreWords = kCoreBytes / 4;
  uint32_t words[3 * kCoreWords];

  /// By all threads of the CTA, followed by a barrier.
  template <typename Element>
  FLASH_ATTN_DEVICE void init() {
    using Weights = StatisticWeights<Element>;
    if (threadIdx.x >= 3 * kCoreWords) return;
    const int core = threadIdx.x / kCoreWords, pair = threadIdx.x % 4;  // of k
    uint32_t word = 0;
    if (core < 2 && pair / 2 == core) {
      word = pair % 2 == 0 ? pack<Element>(Weights::kHigh, Weights::kMid) : pack<Element>(Weights::kLow, 0.f);
    }
    words[threadIdx.x] = word;
    async_proxy_fence();  // wgmma reads it
  }
};

// Lower words of the descriptors; the distance between the halves of k stands above the address. In a cluster a shared
// address has the CTA's rank above bit 18.
FLASH_ATTN_DEVICE uint32_t lse_weights_descriptor(const StatisticOperand& operand) {
  return (shared_address(operand.words) & 0x3FFFF) >> 4 | 2 * StatisticOperand::kCoreBytes / 16 << 16;
}
FLASH_ATTN_DEVICE uint32_t delta_weights_descriptor(const StatisticOperand& operand) {
  return ((shared_address(operand.words) & 0x3FFFF) + StatisticOperand::kCoreBytes) >> 4 |
         StatisticOperand::kCoreBytes / 16 << 16;
}
FLASH_ATTN_DEVICE uint32_t statistics_descriptor(const void* rows) { return (shared_address(rows) & 0x3FFFF) >> 4; }

// acc += weights (64 x 16) statistics^T (16 x n). Upper words: no swizzle; from one group of eight rows to the next 0
// bytes in the weights and 128 in the statistics.
#define SM90_STATISTICS_STEP(type, element, n, r, a, b)                                                    \
  FLASH_ATTN_DEVICE void add_statistics(element, float (&acc)[r], uint32_t weights, uint32_t statistics) { \
    asm volatile("{.reg .b64 da, db; mov.b64 da, {%" #a ", 0}; mov.b64 db, {%" #b                          \
                 ", 8};\n"                                                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" SM90_REGISTERS_##r   \
                 "}, da, db, 1, 1, 1, 0, 0;}"                                                              \
                 : SM90_ACCUMULATORS_##r                                                                   \
                 : "r"(weights), "r"(statistics));                                                         \
  }

SM90_STATISTICS_STEP("bf16", __nv_bfloat16, 64, 32, 32, 33)
SM90_STATISTICS_STEP("bf16", __nv_bfloat16, 128, 64, 64, 65)
SM90_STATISTICS_STEP("f16", __half, 64, 32, 32, 33)
SM90_STATISTICS_STEP("f16", __half, 128, 64, 64, 65)

}  // namespace flash_attn::cuda::sm90::backward
