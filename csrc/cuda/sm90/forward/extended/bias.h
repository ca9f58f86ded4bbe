// An additive attn_mask's values for the fragments of a consumer's warp, 16 rows of a block.
#pragma once

#include "../../../common/scores/scores.h"
#include "params.h"
#include "tile.h"

namespace flash_attn::cuda::sm90::forward {

/// A hidden score becomes -inf whatever it was: a NaN that is masked out must go.
FLASH_ATTN_DEVICE float add_bias(float score, float bias) { return bias == -INFINITY ? bias : score + bias; }

/// Pairs of 16-bit values to an accumulator's two rows.
template <typename Element>
FLASH_ATTN_DEVICE void add_bias(float (&s)[4], uint32_t row0, uint32_t row8) {
  s[0] = add_bias(s[0], low_half(row0, Element()));
  s[1] = add_bias(s[1], high_half(row0, Element()));
  s[2] = add_bias(s[2], low_half(row8, Element()));
  s[3] = add_bias(s[3], high_half(row8, Element()));
}

/// Loaded before the product that they are added to, whose time hides the way from memory. Registers hold the values of
/// a block, of float32 half a block: the others come when these have been added.
template <typename Element, int kTilesN>
struct BiasValues {
  uint32_t words[2 * kTilesN];

  /// `at` of the lane. Columns beyond the tile's are not read; what stands for them does not matter.
  FLASH_ATTN_DEVICE void load(const ExtendedParams& params, const ExtendedTile& tile, const FragmentPlace& at) {
    if (params.problem.mask.dtype == DType::kFloat32) {
      load_tiles<float, 0, kTilesN / 2>(params, tile, at);
    } else {
      load_tiles<uint16_t, 0, kTilesN>(params, tile, at);
    }
  }

  FLASH_ATTN_DEVICE void add(float (&s)[1][kTilesN][4], const ExtendedParams& params, const ExtendedTile& tile,
                             const FragmentPlace& at) {
    if (params.problem.mask.dtype == DType::kFloat32) {
      add_floats<0, kTilesN / 2>(s);
      load_tiles<float, kTilesN / 2, kTilesN * 3 / 4>(params, tile, at);
      add_floats<kTilesN / 2, kTilesN * 3 / 4>(s);
      load_tiles<float, kTilesN * 3 / 4, kTilesN>(params, tile, at);
      add_floats<kTilesN * 3 / 4, kTilesN>(s);
    } else {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) add_bias<Element>(s[0][n], words[2 * n], words[2 * n + 1]);
    }
  }

 private:
  template <int kBegin, int kEnd>
  FLASH_ATTN_DEVICE void add_floats(float (&s)[1][kTilesN][4]) const {
#pragma unroll
    for (int n = kBegin; n < kEnd; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[0][n][i] = add_bias(s[0][n][i], __uint_as_float(words[4 * (n - kBegin) + i]));
    }
  }

  FLASH_ATTN_DEVICE static uint32_t bits_of(float x) { return __float_as_uint(x); }
  FLASH_ATTN_DEVICE static uint32_t bits_of(uint16_t x) { return x; }

  /// Fragments kBegin .. kEnd - 1.
  template <typename Storage, int kBegin, int kEnd>
  FLASH_ATTN_DEVICE void load_tiles(const ExtendedParams& params, const ExtendedTile& tile, const FragmentPlace& at) {
    constexpr bool kFloats = sizeof(Storage) == 4;
    const MaskView& mask = params.problem.mask;
    uint32_t lane_col = at.col, lane_row = at.row;
    forget_derived(lane_col);  // or addresses would take registers before they are needed
    forget_derived(lane_row);
    const int first_col = static_cast<int>(lane_col), first_row = static_cast<int>(lane_row);
    const int col_end = tile.col_begin + tile.num_cols, last_row = tile.seqlen_q - 1;
    const Storage* const of_head =
        static_cast<const Storage*>(mask.data) + tile.batch * mask.batch + tile.head * mask.head;
    // The first column of the block, the same for all lanes.
    const bool pairs = params.mask_pairs && first_col - 2 * (static_cast<int>(threadIdx.x) % 4) + 8 * kEnd <= col_end;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Storage* const row = of_head + int64_t{min(first_row + 8 * r, last_row)} * mask.row;
      if (pairs) {
        const Storage* const from = row + first_col;
#pragma unroll
        for (int n = kBegin; n < kEnd; ++n) {
          if constexpr (kFloats) {
            const float2 x = __ldg(reinterpret_cast<const float2*>(from + 8 * n));
            words[4 * (n - kBegin) + 2 * r] = __float_as_uint(x.x);
            words[4 * (n - kBegin) + 2 * r + 1] = __float_as_uint(x.y);
          } else {
            words[2 * n + r] = __ldg(reinterpret_cast<const unsigned int*>(from + 8 * n));
          }
        }
      } else {
        const Storage* from = row + (first_col + 8 * kBegin) * mask.col;
#pragma unroll
        for (int n = kBegin; n < kEnd; ++n, from += 8 * mask.col) {
          uint32_t low = 0, high = 0;  // of columns that do not exist
          if (first_col + 8 * n < col_end) low = bits_of(from[0]);
          if (first_col + 8 * n + 1 < col_end) high = bits_of(from[mask.col]);
          if constexpr (kFloats) {
            words[4 * (n - kBegin) + 2 * r] = low;
            words[4 * (n - kBegin) + 2 * r + 1] = high;
          } else {
            words[2 * n + r] = low | high << 16;
          }
        }
      }
    }
  }
};

}  // namespace flash_attn::cuda::sm90::forward
