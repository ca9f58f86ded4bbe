// Keys and values in float8_e4m3fn become float16 operands in registers, which holds every one of them exactly.
//
// Fragments are of mma.sync (sm80/mma.h), whose order of columns is free where both operands keep it. ldmatrix moves
// pairs of bytes as if they were 16-bit elements, so lane 4 g + t gets, of 16 columns of key g, columns 4 t to 4 t + 3:
// with queries in the same order, the first two stand for columns 2 t and 2 t + 1 of the fragment and the last two for
// those + 8. Of values, transposed, it gets columns 2 g and 2 g + 1 of keys 2 t and 2 t + 1: one fragment has the even
// columns of 16, the next the odd ones, and a lane's four sums of a row are of columns 4 t to 4 t + 3.
#pragma once

#include "../../sm80/softmax.h"
#include "config.h"

namespace flash_attn::cuda::decode {

/// The float8 in bits 0 to 15, and those in bits 16 to 31.
FLASH_ATTN_DEVICE uint2 halves(uint32_t x) {
  uint2 y = {0, 0};
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  asm("{.reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;}"
      : "=r"(y.x), "=r"(y.y)
      : "r"(x));
#endif
  return y;
}

/// Bytes 0, 2, 1, 3.
FLASH_ATTN_DEVICE uint32_t even_then_odd(uint32_t x) { return __byte_perm(x, 0, 0x3120); }

/// Queries as float16, of which unit() is a multiple: bfloat16 has a wider range, so a row is multiplied by the power
/// of 2 that brings its largest to 2^14. What is then below float16's smallest is 2^-38 of the largest.
template <typename Element>
struct HalfScale {
  float largest[2] = {0.f, 0.f};  // of the lane's two rows
  int shift[2];

  FLASH_ATTN_DEVICE static float low(uint32_t x) { return __uint_as_float(x << 16); }
  FLASH_ATTN_DEVICE static float high(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }

  /// First of all fragments.
  FLASH_ATTN_DEVICE void add(const uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest[i % 2] = fmaxf(largest[i % 2], fmaxf(fabsf(low(a[i])), fabsf(high(a[i]))));
  }
  FLASH_ATTN_DEVICE void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int exponent = int(__float_as_uint(sm80::quad_max(largest[r])) >> 23) - 127;
      // Nothing to bring up, or no number: as it is. Below 2^-100 the power would leave float32.
      shift[r] = exponent == 128 || exponent < -100 ? 0 : 14 - exponent;
    }
  }
  FLASH_ATTN_DEVICE float unit(int r) const { return __uint_as_float(uint32_t(127 - shift[r]) << 23); }
  FLASH_ATTN_DEVICE void apply(uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float factor = __uint_as_float(uint32_t(127 + shift[i % 2]) << 23);
      a[i] = sm80::pack<__half>(low(a[i]) * factor, high(a[i]) * factor);
    }
  }
};

/// float16 is what it is.
template <>
struct HalfScale<__half> {
  FLASH_ATTN_DEVICE void add(const uint32_t (&)[4]) {}
  FLASH_ATTN_DEVICE void finish() {}
  FLASH_ATTN_DEVICE float unit(int) const { return 1.f; }
  FLASH_ATTN_DEVICE void apply(uint32_t (&)[4]) const {}
};

}  // namespace flash_attn::cuda::decode
