// Products of tiles in shared memory on a warp's fragments (layouts: mma.h). A lane's ldmatrix address, within 16 x 16
// elements of a tile, is one of two: rows of its first and second matrix side by side below each other (for A operands
// as they lie, and B operands that are transposed), or columns (for the others).
#pragma once

#include "shared_tile.h"

namespace flash_attn::cuda::sm80 {

/// Matrices 0 to 3 are the upper left, lower left, upper right and lower right 8 x 8 elements.
template <typename Tile>
SM80_DEVICE uint32_t address_by_rows(uint32_t tile, int row, int lane) {
  return tile + Tile::offset(row + lane % 16, lane / 16);
}

/// Upper left, upper right, lower left, lower right.
template <typename Tile>
SM80_DEVICE uint32_t address_by_columns(uint32_t tile, int row, int lane) {
  return tile + Tile::offset(row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

template <int kM, int kN>
SM80_DEVICE void clear(float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.f;
}

/// acc (16 kM, 8 kN) = first + a b^T over the columns of both tiles; a by rows, b by columns. `first(n)` gives what the
/// lane's two columns of tile n begin with. Of the kColumns / 16 steps the compiler sees kUnroll at once.
template <typename Element, int kColumns, int kUnroll = kColumns / 16, int kM, int kN, typename First>
SM80_DEVICE void multiply_rows(float (&acc)[kM][kN][4], uint32_t a, uint32_t b, const First& first) {
  using Tile = SharedTile<kColumns>;
  static_assert(kN % 2 == 0);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 upper = first(n), lower = first(n);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      acc[m][n][0] = upper.x, acc[m][n][1] = upper.y, acc[m][n][2] = lower.x, acc[m][n][3] = lower.y;
    }
  }
#pragma unroll kUnroll
  for (int k = 0; k < kColumns / 16; ++k) {
    uint32_t x[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ldmatrix_x4(x[m], Tile::along(a, k) + m * 16 * Tile::kRowBytes);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t y[4];
      ldmatrix_x4(y, Tile::along(b, k) + n * 8 * Tile::kRowBytes);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<Element>(acc[m][n], x[m], y[0], y[1]);
        mma_m16n8k16<Element>(acc[m][n + 1], x[m], y[2], y[3]);
      }
    }
  }
}

/// acc (16 kM, 8 kN) += a b, of which a (16 kM, 16) is in registers and b lies by rows: 16 rows of a tile and every
/// kStride-th 16 columns of it. Where shares of columns interleave so, each may begin at any of the kStride places.
/// `change(y)` may change B fragments: of rows 2 t, 2 t + 1 in y[0] and y[2], of those + 8 in y[1] and y[3].
template <typename Element, int kColumns, int kStride, int kM, int kN, typename Change>
SM80_DEVICE void multiply_step(float (&acc)[kM][kN][4], const uint32_t (&a)[kM][4], uint32_t b, const Change& change) {
  using Tile = SharedTile<kColumns>;
  static_assert(kN % 2 == 0 && (kStride & (kStride - 1)) == 0);
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    uint32_t y[4];
    ldmatrix_x4_trans(y, Tile::along(b, n / 2 * kStride));
    change(y);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      mma_m16n8k16<Element>(acc[m][n], a[m], y[0], y[1]);
      mma_m16n8k16<Element>(acc[m][n + 1], a[m], y[2], y[3]);
    }
  }
}

template <typename Element, int kColumns, int kStride, int kM, int kN>
SM80_DEVICE void multiply_step(float (&acc)[kM][kN][4], const uint32_t (&a)[kM][4], uint32_t b) {
  multiply_step<Element, kColumns, kStride>(acc, a, b, [](uint32_t (&)[4]) {});
}

/// An A fragment goes to 16 x 16 elements of a tile: rows from `row` on, columns of number `step`.
template <typename Tile>
SM80_DEVICE void store_fragment(uint32_t tile, int row, int step, int lane, const uint32_t (&a)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   Tile::along(address_by_rows<Tile>(tile, row, lane), step)),
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
               : "memory");
#else
  const uint32_t to = Tile::along(tile + Tile::offset(row + lane / 4, 0) + 4 * (lane % 4), step);
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(a[0]) : "memory");
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + 8 * Tile::kRowBytes), "r"(a[1]) : "memory");
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to ^ 16), "r"(a[2]) : "memory");
  asm volatile("st.shared.b32 [%0], %1;" ::"r"((to ^ 16) + 8 * Tile::kRowBytes), "r"(a[3]) : "memory");
#endif
}

}  // namespace flash_attn::cuda::sm80
