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

/// A product C (+)= A B of one or two tiles of columns: A (rows, depth), B (depth, columns).
struct Strip {
  int64_t rows, depth;  // rows are rounded up to whole tiles; at most kTilePairs pairs, as configured, or whole tiles
  const uint32_t* a;
  int64_t lda;
  const uint32_t* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  bool accumulate;
};

/// Register kTile of 0 to 3: the instructions want their numbers written down.
template <int kTile>
FLASH_ATTN_INLINE void start_tile(const float* c, size_t bytes, bool accumulate) {
  static_assert(kTile >= 0 && kTile < 4);
  if (accumulate) {
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

/// Strips one after the other. A store right after the last product of its sum holds up the products that follow until
/// it is done; a later one runs beside them. So the sums of up to two rows of tiles stay in registers 0 to 3 until the
/// first products of the next have begun. (Everything here has to be inlined: a call that takes its operands from
/// memory costs a fifth of the time.)
template <int kColumns>
class Strips {
 public:
  FLASH_ATTN_INLINE void add(const Strip& strip) {
    const uint32_t* a = strip.a;
    float* c = strip.c;
    int64_t rows = strip.rows;
    settle_memory(a);
    for (; rows > kTileRows; rows -= 2 * kTileRows) {
      multiply<2>(strip, a, c);
      a += 2 * kTileRows * strip.lda;
      c += 2 * kTileRows * strip.ldc;
    }
    if (rows > 0) multiply<1>(strip, a, c);
  }

  FLASH_ATTN_INLINE void finish() {
    store<0>();
    store<1>();
    store<2>();
    store<3>();
  }

 private:
  template <int kRows>
  FLASH_ATTN_INLINE void multiply(const Strip& strip, const uint32_t* a, float* c) {
    const size_t a_bytes = size_t(strip.lda) * 4, b_bytes = size_t(strip.ldb) * 4, c_bytes = size_t(strip.ldc) * 4;
    const uint32_t *const a_below = a + kTileRows * strip.lda, *b = strip.b;
    float* const c_below = c + kTileRows * strip.ldc;
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_bytes);
    store<0>();
    start_tile<0>(c, c_bytes, strip.accumulate);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) {
      _tile_loadd(7, b + 16, b_bytes);
      store<1>();
      start_tile<1>(c + 16, c_bytes, strip.accumulate);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows == 2) _tile_loadd(5, a_below, a_bytes);
    store<2>();
    if constexpr (kRows == 2) {
      start_tile<2>(c_below, c_bytes, strip.accumulate);
      _tile_dpbf16ps(2, 5, 6);
    }
    store<3>();
    if constexpr (kRows == 2 && kColumns == 2) {
      start_tile<3>(c_below + 16, c_bytes, strip.accumulate);
      _tile_dpbf16ps(3, 5, 7);
    }
    for (int64_t k = kTilePairs; k < strip.depth; k += kTilePairs) {
      b += kTilePairs * strip.ldb;
      _tile_loadd(4, a + k, a_bytes);
      _tile_loadd(6, b, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kColumns == 2) {
        _tile_loadd(7, b + 16, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kRows == 2) {
        _tile_loadd(5, a_below + k, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kColumns == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
    unstored_ = c;
    unstored_below_ = kRows == 2 ? c_below : nullptr;
    bytes_ = c_bytes;
  }

  template <int kTile>
  FLASH_ATTN_INLINE void store() {
    if constexpr (kTile % 2 < kColumns) {
      float* const c = kTile < 2 ? unstored_ : unstored_below_;
      if (c == nullptr) return;
      if constexpr (kTile == 0) _tile_stored(0, c, bytes_);
      if constexpr (kTile == 1) _tile_stored(1, c + 16, bytes_);
      if constexpr (kTile == 2) _tile_stored(2, c, bytes_);
      if constexpr (kTile == 3) _tile_stored(3, c + 16, bytes_);
    }
  }

  float *unstored_ = nullptr, *unstored_below_ = nullptr;  // of the rows of tiles whose sums are in registers
  size_t bytes_ = 0;
};

/// A (depth, 16 rows) -> to (16 rows, ld), zeros up to a multiple of kTilePairs.
inline void transpose_rows(const uint32_t* a, int64_t lda, int64_t depth, uint32_t* to, int64_t ld) {
  for (int64_t k = 0; k < depth; k += kTilePairs) {
    Words block[kTilePairs];
    if (k + kTilePairs <= depth) {
      load_transposed(a + k * lda, lda * sizeof(*a), block);
    } else {
      for (int i = 0; i < kTilePairs; ++i) block[i] = k + i < depth ? load_vector<Words>(a + (k + i) * lda) : Words{};
      transpose<uint32_t>(block);
    }
    for (int i = 0; i < kTileRows; ++i) store_vector(to + i * ld + k, block[i]);
  }
}

/// The product of all columns, of which the strip is the first two tiles.
FLASH_ATTN_INLINE void multiply_columns(Strip strip, int64_t columns) {
  Strips<2> strips;
  for (; columns >= 32; columns -= 32) {
    strips.add(strip);
    strip.b += 32;
    strip.c += 32;
  }
  strips.finish();
  if (columns == 0) return;
  Strips<1> last;
  last.add(strip);
  last.finish();
}

template <bool kDepthMajor>
void multiply_tiles(const Strip& strip, int64_t columns) {
  if constexpr (!kDepthMajor) {
    multiply_columns(strip, columns);
  } else {
    for (int64_t row = 0; row < strip.rows; row += 2 * kTileRows) {
      alignas(64) uint32_t transposed[2 * kTileRows * kMaxTransposedPairs];
      Strip part = strip;
      part.rows = strip.rows - row < 2 * kTileRows ? strip.rows - row : 2 * kTileRows;
      part.a = transposed;
      part.lda = kMaxTransposedPairs;
      part.c += row * strip.ldc;
      for (int64_t i = 0; i < part.rows; i += kTileRows) {
        transpose_rows(strip.a + row + i, strip.lda, strip.depth, transposed + i * part.lda, part.lda);
      }
      multiply_columns(part, columns);
    }
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
  Strip strip{rows, whole, a, lda, b, ldb, c, ldc, accumulate};
  if (whole > 0) multiply_tiles<kDepthMajor>(strip, columns);
  if (rest == 0) return;
  configure_tiles(rest);
  strip.depth = rest;
  strip.a += whole * (kDepthMajor ? lda : 1);
  strip.b += whole * ldb;
  strip.accumulate = accumulate || whole > 0;
  multiply_tiles<kDepthMajor>(strip, columns);
  configure_tiles(kTilePairs);
}

}  // namespace
}  // namespace flash_attn::cpu
