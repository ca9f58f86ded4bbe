// An additive attn_mask on one warp's accumulator fragments, see common/scores/scores.h for what those are.
#pragma once

#include "../../../common/scores/scores.h"
#include "../../mma.h"

namespace flash_attn::cuda::sm80 {

SM80_DEVICE bool has_lowest(uint32_t pair, __nv_bfloat16) {
  return low_half(pair, __nv_bfloat16()) == -INFINITY || high_half(pair, __nv_bfloat16()) == -INFINITY;
}
SM80_DEVICE bool has_lowest(uint32_t pair, __half) {
  return low_half(pair, __half()) == -INFINITY || high_half(pair, __half()) == -INFINITY;
}
/// The smaller of both lower halves, and of both upper ones; what is not NaN.
SM80_DEVICE uint32_t least_halves(uint32_t x, uint32_t y, __nv_bfloat16) {
  asm("min.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  return x;
}
SM80_DEVICE uint32_t least_halves(uint32_t x, uint32_t y, __half) {
  asm("min.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  return x;
}

/// An additive attn_mask's values for one warp's fragments: loaded before the products that they are added to, whose
/// time hides the way from memory. What is asked of a number is asked of all of them at once: asked of each, it is what
/// a kernel does most.
template <typename Element, int kMTiles, int kNTiles>
struct BiasFragments {
  uint32_t raw[kMTiles][kNTiles][4];  // as elements lie; of 16 bits in two words

  /// Columns at or past cols_end are not read and count as 0. `pairs`: columns 2 j, 2 j + 1 are one aligned word.
  SM80_DEVICE void load(const MaskView& mask, int batch, int head, const FragmentPlace& at, int rows_end, int cols_end,
                        bool pairs) {
    const int64_t origin = batch * mask.batch + head * mask.head;
    const bool whole = __all_sync(~0u, pairs && at.col + 8 * (kNTiles - 1) + 1 < cols_end);
    if (mask.dtype == DType::kFloat32) {
      load_as(static_cast<const float*>(mask.data) + origin, mask, at, rows_end, cols_end, whole);
    } else {
      load_as(static_cast<const uint16_t*>(mask.data) + origin, mask, at, rows_end, cols_end, whole);
    }
  }

  SM80_DEVICE void add(float (&s)[kMTiles][kNTiles][4], DType dtype) const {
    if (dtype == DType::kFloat32) {
      add_to<true>(s, [&](int m, int n, int i) { return __uint_as_float(raw[m][n][i]); });
      return;
    }
    const auto bias = [&](int m, int n, int i) {
      const uint32_t pair = raw[m][n][i / 2];
      return i % 2 == 0 ? low_half(pair, Element()) : high_half(pair, Element());
    };
    uint32_t least = raw[0][0][0];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int n = 0; n < kNTiles; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) least = least_halves(least, raw[m][n][r], Element());
    if (__any_sync(~0u, has_lowest(least, Element()))) {
      add_to<true>(s, bias);
    } else {
      add_to<false>(s, bias);
    }
  }

 private:
  /// kHides: a hidden score becomes -inf whatever it was, for a NaN that is masked out must go.
  template <bool kHides, typename Bias>
  SM80_DEVICE static void add_to(float (&s)[kMTiles][kNTiles][4], const Bias& bias) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int n = 0; n < kNTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = bias(m, n, i);
          s[m][n][i] = kHides && x == -INFINITY ? x : s[m][n][i] + x;
        }
  }

  /// `whole`: all columns exist, in pairs.
  template <typename Storage>
  SM80_DEVICE void load_as(const Storage* data, const MaskView& mask, const FragmentPlace& at, int rows_end,
                           int cols_end, bool whole) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Storage* const from = data + int64_t{min(at.row + 16 * m + 8 * r, rows_end - 1)} * mask.row;
        if (whole) {
          load_pairs(from + at.col, m, r);
        } else {
          load_each(from + at.col * mask.col, mask.col, cols_end - at.col, m, r);
        }
      }
    }
  }
  SM80_DEVICE void load_pairs(const float* from, int m, int r) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const float2 x = __ldg(reinterpret_cast<const float2*>(from + 8 * n));
      raw[m][n][2 * r] = __float_as_uint(x.x), raw[m][n][2 * r + 1] = __float_as_uint(x.y);
    }
  }
  SM80_DEVICE void load_pairs(const uint16_t* from, int m, int r) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) raw[m][n][r] = __ldg(reinterpret_cast<const unsigned int*>(from + 8 * n));
  }
  /// The first `columns` from `from` on exist.
  template <typename Storage>
  SM80_DEVICE void load_each(const Storage* from, int64_t stride, int columns, int m, int r) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      uint32_t low = 0, high = 0;
      if (8 * n < columns) low = bits_of(from[8 * n * stride]);
      if (8 * n + 1 < columns) high = bits_of(from[(8 * n + 1) * stride]);
      if constexpr (sizeof(Storage) == 4) {
        raw[m][n][2 * r] = low, raw[m][n][2 * r + 1] = high;
      } else {
        raw[m][n][r] = low | high << 16;
      }
    }
  }
  SM80_DEVICE static uint32_t bits_of(float x) { return __float_as_uint(x); }
  SM80_DEVICE static uint32_t bits_of(uint16_t x) { return x; }
};

}  // namespace flash_attn::cuda::sm80
