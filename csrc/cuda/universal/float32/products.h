// The products of two tiles in shared memory, by multiply-adds, as sums in registers.
//
// 256 threads form 16 x 16. A warp holds two rows of them: lane l stands at row l % 2, column l / 2. So the 16 bytes
// that 16 lanes of a half warp read are of 8 places at most and each of two neighbours' own, which shared memory serves
// at once. A thread has 8 rows of each result and 4 or 8 columns, in quads: of 3 or 4 such reads come 32 or 64
// multiply-adds. Operands have the terms of a sum as rows, so that those of one term do not depend on each other.
#pragma once

#include "../../common/ptx.h"

namespace flash_attn::cuda::universal::float32 {

constexpr int kThreads = 256;
constexpr int kGrid = 16;  // threads along either side
constexpr int kRows = 8;   // of a thread

FLASH_ATTN_DEVICE int warp_id() { return int(threadIdx.x) / 32; }
FLASH_ATTN_DEVICE int grid_row() { return 2 * warp_id() + int(threadIdx.x) % 2; }
FLASH_ATTN_DEVICE int grid_column() { return int(threadIdx.x) % 32 / 2; }

/// The same, worked out anew where registers are few.
struct FreshPlace {
  int row, column;

  FLASH_ATTN_DEVICE FreshPlace() {
    uint32_t thread = threadIdx.x;
    forget_derived(thread);
    row = int(thread / 32 * 2 + thread % 2), column = int(thread % 32 / 2);
  }
};

FLASH_ATTN_DEVICE float natural_exp(float x) { return fast_exp2(x * 1.4426950408889634f); }

FLASH_ATTN_DEVICE void load_four(const float* from, float (&x)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

template <int kN, int kM>
FLASH_ATTN_DEVICE void clear(float (&x)[kN][kM]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
#pragma unroll
    for (int j = 0; j < kM; ++j) x[i][j] = 0.f;
  }
}

/// Of a thread's sums number `i` along a side: quads, 64 apart.
FLASH_ATTN_DEVICE int place_of(int thread, int i) { return 4 * thread + i % 4 + i / 4 * 4 * kGrid; }

/// c += a^T b over kTerms rows of both, kLdA and kLdB apart. c[i][j]: columns place_of(grid_row(), i) of a and
/// place_of(grid_column(), j) of b. Terms are added in their order.
template <int kTerms, int kLdA, int kLdB, int kColumns>
FLASH_ATTN_DEVICE void add_outer(const float* a, const float* b, float (&c)[kRows][kColumns]) {
  a += 4 * grid_row();
  b += 4 * grid_column();
  float x[2][kRows / 4][4], y[2][kColumns / 4][4];
  const auto load = [&](int k, int to) {
#pragma unroll
    for (int g = 0; g < kRows / 4; ++g) load_four(a + k * kLdA + 4 * kGrid * g, x[to][g]);
#pragma unroll
    for (int g = 0; g < kColumns / 4; ++g) load_four(b + k * kLdB + 4 * kGrid * g, y[to][g]);
  };
  load(0, 0);
#pragma unroll(kColumns == 8 ? 2 : 4)  // where ptxas keeps the order best
  for (int k = 0; k < kTerms; ++k) {
    if (k + 1 < kTerms) load(k + 1, (k + 1) % 2);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int j = i % 2 == 0 ? n : kColumns - 1 - n;  // there and back: two operands in a row are the same
        c[i][j] = fmaf(x[k % 2][i / 4][i % 4], y[k % 2][j / 4][j % 4], c[i][j]);
      }
    }
  }
}

/// Where a thread stands in a result of 64 x kWidth that is 8 threads high; at 64 columns two halves of the warps have
/// one each, over half of the terms.
template <int kWidth>
struct LowGrid {
  static constexpr int kHalves = 128 / kWidth, kPairsOfRows = 4;
  static_assert(kHalves == 1 || kHalves == 2);
  int half, row, column;  // rows row + 8 i, columns 4 column + u

  FLASH_ATTN_DEVICE LowGrid() {
    const int warp = warp_id(), across = warp / kPairsOfRows;
    half = kHalves == 2 ? across : 0;
    row = warp % kPairsOfRows * 2 + int(threadIdx.x) % 2;
    column = (kHalves == 2 ? 0 : across * kGrid) + grid_column();
  }
};

/// c += s k over kTerms columns of s, whose rows are kLd apart, and rows of k, kWidth columns each; from where the
/// caller's half starts. c[i][u] as in LowGrid.
template <int kTerms, int kLd, int kWidth>
FLASH_ATTN_DEVICE void add_low(const LowGrid<kWidth>& at, const float* s, const float* k, float (&c)[kRows][4]) {
  s += at.row * kLd;
  k += 4 * at.column;
#pragma unroll 1
  for (int n = 0; n < kTerms; n += 4) {
    float y[4][4];
#pragma unroll
    for (int v = 0; v < 4; ++v) load_four(k + (n + v) * kWidth, y[v]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float x[4];
      load_four(s + 8 * i * kLd + n, x);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
#pragma unroll
        for (int u = 0; u < 4; ++u) c[i][u] = fmaf(x[v], y[v][u], c[i][u]);
      }
    }
  }
}

}  // namespace flash_attn::cuda::universal::float32
