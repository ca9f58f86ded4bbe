// The product of gemm.h for pairs of bfloat16 on AMX, whose tile registers hold 16 rows of 64 bytes: 16 x 16 floats of
// C, 16 rows of 16 pairs of A, 16 pairs of rows of 16 columns of B, which is how B lies already.
#pragma once

#include "../isa.h"
#include "transpose.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

constexpr int kTileRows = 16, kTilePairs = 16;
constexpr int64_t kMaxTransposedPairs = 64;  // depth of a product whose A lies depth-major
static_assert(kForwardBlockN <= 2 * kMaxTransposedPairs && kBackwardBlockN <= 2 * kMaxTransposedPairs,
              "sums over the keys of a tile are such products");

/// gcc 12 does not say that the instructions on tiles read memory: what lies at `p` has to be there by now.
inline void settle_memory(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

/// Registers 0 to 3 for C, 4 and 5 for A, 6 and 7 for B, with `pairs` in a row of A.
inline void configure_tiles(int pairs) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? 4 * pairs : 64);
    config.rows[i] = uint8_t(i >= 6 ? pairs : kTileRows);
  }
  settle_memory(&config);
  _tile_loadconfig(&config);
}

/// The calling thread's tile registers, from here to the end of the scope: unconfigured ones cost a switch of threads
/// nothing.
class MatrixUnit {
 public:
  MatrixUnit() { configure_tiles(kTilePairs); }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

/// One or two tiles of rows by one or two of columns; `step` pairs at a time, as configured.
template <int kRows, int kColumns>
void multiply_block(int64_t depth, int step, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                    int64_t ldc, bool accumulate) {
  const size_t a_bytes = size_t(lda) * 4, b_bytes = size_t(ldb) * 4, c_bytes = size_t(ldc) * 4;
  float* const c_below = c + kTileRows * ldc;
  settle_memory(a);
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kColumns == 2) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kRows == 2) _tile_loadd(2, c_below, c_bytes);
    if constexpr (kRows == 2 && kColumns == 2) _tile_loadd(3, c_below + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += step) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b + k * ldb, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) {
      _tile_loadd(7, b + k * ldb + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows == 2) {
      _tile_loadd(5, a + kTileRows * lda + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kRows == 2 && kColumns == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kColumns == 2) _tile_stored(1, c + 16, c_bytes);
  if constexpr (kRows == 2) _tile_stored(2, c_below, c_bytes);
  if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, c_below + 16, c_bytes);
}

/// Register kTile of 0 to 3: the instructions want their numbers written down.
template <int kTile, bool kAccumulate>
FLASH_ATTN_INLINE void start_tile(const float* c, size_t bytes) {
  static_assert(kTile >= 0 && kTile < 4);
  if constexpr (kAccumulate) {
    if constexpr (kTile == 0) _tile_loadd(0, c, bytes);
    if constexpr (kTile == 1) _tile_loadd(1, c, bytes);
    if constexpr (kTile == 2) _tile_loadd(2, c, bytes);
    if constexpr (kTile == 3) _tile_loadd(3, c, bytes);
  } else {
    if constexpr (kTile == 0) _tile_zero(0);
    if constexpr (kTile == 1) _tile_zero(1);
    if constexpr (kTile == 2) _tile_zero(2);
    if constexpr (kTile == 3) _tile_zero(3);
  }
}

/// Tiles of rows below each other, by kColumns of columns. A store takes as long as a product and waits for the last of
/// its sum, so that those of two rows of tiles come between the first products of the next two.
template <int kColumns, bool kAccumulate>
void multiply_strip(int64_t row_tiles, int64_t depth, int step, const uint32_t* a, int64_t lda, const uint32_t* b,
                    int64_t ldb, float* c, int64_t ldc) {
  const size_t a_bytes = size_t(lda) * 4, b_bytes = size_t(ldb) * 4, c_bytes = size_t(ldc) * 4;
  float* before = nullptr;  // two rows of tiles that are in registers 0 to 3 still
  settle_memory(a);
  for (; row_tiles >= 2; row_tiles -= 2) {
    const uint32_t* const a_below = a + kTileRows * lda;
    float* const c_below = c + kTileRows * ldc;
    float* const before_below = before + kTileRows * ldc;
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_bytes);
    if (before != nullptr) _tile_stored(0, before, c_bytes);
    start_tile<0, kAccumulate>(c, c_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) {
      _tile_loadd(7, b + 16, b_bytes);
      if (before != nullptr) _tile_stored(1, before + 16, c_bytes);
      start_tile<1, kAccumulate>(c + 16, c_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_loadd(5, a_below, a_bytes);
    if (before != nullptr) _tile_stored(2, before_below, c_bytes);
    start_tile<2, kAccumulate>(c_below, c_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kColumns == 2) {
      if (before != nullptr) _tile_stored(3, before_below + 16, c_bytes);
      start_tile<3, kAccumulate>(c_below + 16, c_bytes);
      _tile_dpbf16ps(3, 5, 7);
    }
    for (int64_t k = step; k < depth; k += step) {
      _tile_loadd(4, a + k, a_bytes);
      _tile_loadd(6, b + k * ldb, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kColumns == 2) {
        _tile_loadd(7, b + k * ldb + 16, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_loadd(5, a_below + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
    before = c;
    a += 2 * kTileRows * lda;
    c += 2 * kTileRows * ldc;
  }
  if (before != nullptr) {
    _tile_stored(0, before, c_bytes);
    if constexpr (kColumns == 2) _tile_stored(1, before + 16, c_bytes);
    before += kTileRows * ldc;
    _tile_stored(2, before, c_bytes);
    if constexpr (kColumns == 2) _tile_stored(3, before + 16, c_bytes);
  }
  if (row_tiles > 0) multiply_block<1, kColumns>(depth, step, a, lda, b, ldb, c, ldc, kAccumulate);
}

/// `columns` columns of kRows tiles of rows.
template <int kRows>
void multiply_rows(int64_t columns, int64_t depth, int step, const uint32_t* a, int64_t lda, const uint32_t* b,
                   int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  int64_t column = 0;
  for (; column + 32 <= columns; column += 32) {
    multiply_block<kRows, 2>(depth, step, a, lda, b + column, ldb, c + column, ldc, accumulate);
  }
  if (column < columns) multiply_block<kRows, 1>(depth, step, a, lda, b + column, ldb, c + column, ldc, accumulate);
}

/// A (depth, 16 rows) -> to (16 rows, ld), zeros up to a multiple of kTilePairs.
inline void transpose_rows(const uint32_t* a, int64_t lda, int64_t depth, uint32_t* to, int64_t ld) {
  for (int64_t k = 0; k < depth; k += kTilePairs) {
    Words block[kTilePairs];
    for (int i = 0; i < kTilePairs; ++i) block[i] = k + i < depth ? load_vector<Words>(a + (k + i) * lda) : Words{};
    transpose<uint32_t>(block);
    for (int i = 0; i < kTileRows; ++i) store_vector(to + i * ld + k, block[i]);
  }
}

/// A (rows, depth).
template <bool kAccumulate>
void multiply_strips(int64_t rows, int64_t columns, int64_t depth, int step, const uint32_t* a, int64_t lda,
                     const uint32_t* b, int64_t ldb, float* c, int64_t ldc) {
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  int64_t column = 0;
  for (; column + 32 <= columns; column += 32) {
    multiply_strip<2, kAccumulate>(row_tiles, depth, step, a, lda, b + column, ldb, c + column, ldc);
  }
  if (column < columns) {
    multiply_strip<1, kAccumulate>(row_tiles, depth, step, a, lda, b + column, ldb, c + column, ldc);
  }
}

/// A (depth, rows), turned for all columns at once.
inline void multiply_transposed(int64_t rows, int64_t columns, int64_t depth, int step, const uint32_t* a, int64_t lda,
                                const uint32_t* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
    const bool two = rows - row > kTileRows;
    constexpr int64_t ld = kMaxTransposedPairs;
    alignas(64) uint32_t transposed[2 * kTileRows * ld];
    transpose_rows(a + row, lda, depth, transposed, ld);
    if (two) transpose_rows(a + row + kTileRows, lda, depth, transposed + kTileRows * ld, ld);
    (two ? multiply_rows<2> : multiply_rows<1>)(columns, depth, step, transposed, ld, b, ldb, c + row * ldc, ldc,
                                                accumulate);
  }
}

template <bool kDepthMajor>
void multiply_tiles(int64_t rows, int64_t columns, int64_t depth, int step, const uint32_t* a, int64_t lda,
                    const uint32_t* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if constexpr (kDepthMajor) {
    multiply_transposed(rows, columns, depth, step, a, lda, b, ldb, c, ldc, accumulate);
  } else {
    (accumulate ? multiply_strips<true> : multiply_strips<false>)(rows, columns, depth, step, a, lda, b, ldb, c, ldc);
  }
}

/// gemm() of gemm.h, on the registers of a MatrixUnit.
template <bool kDepthMajor>
void gemm_on_tiles(int64_t rows, int64_t columns, int64_t depth, const uint32_t* a, int64_t lda, const uint32_t* b,
                   int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  const int64_t whole = depth / kTilePairs * kTilePairs;
  const int rest = int(depth - whole);
  for (int64_t row = 0; depth == 0 && !accumulate && row < rows; ++row) {
    std::memset(c + row * ldc, 0, size_t(columns) * sizeof(float));
  }
  if (whole > 0) {
    multiply_tiles<kDepthMajor>(rows, columns, whole, kTilePairs, a, lda, b, ldb, c, ldc, accumulate);
  }
  if (rest == 0) return;
  configure_tiles(rest);
  multiply_tiles<kDepthMajor>(rows, columns, rest, rest, a + whole * (kDepthMajor ? lda : 1), lda, b + whole * ldb, ldb,
                              c, ldc, accumulate || whole > 0);
  configure_tiles(kTilePairs);
}

}  // namespace
}  // namespace flash_attn::cpu
