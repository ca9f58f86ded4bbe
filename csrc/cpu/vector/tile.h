// Tiles between tensors and scratch: rows of q, k, v, dout packed as the products want them, results stored as rows.
// A tile's leading dimensions are multiples of the vector's lanes; everything beyond the tensor is packed as 0.
#pragma once

#include <type_traits>

#include "../../tensor_view.h"
#include "gemm.h"
#include "transpose.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

/// Rows of one head of a tensor: (count, columns), unit stride along a row. `drop`, when given, marks rows that are
/// read as 0.
struct Rows {
  const void* data;
  DType dtype;
  int64_t stride;  // elements
  int64_t count, columns;
  const uint8_t* drop = nullptr;

  bool present(int64_t row) const { return row < count && (drop == nullptr || drop[row] == 0); }
  bool all_present(int64_t row, int64_t rows) const { return row + rows <= count && drop == nullptr; }
};

/// Calls f(static_cast<const Storage*>(nullptr)) with the storage type of `dtype`, of those that are computed as T.
template <typename T, typename F>
FLASH_ATTN_INLINE void with_storage(DType dtype, F f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<const double*>(nullptr));
  } else {
    if (dtype == DType::kFloat32) f(static_cast<const float*>(nullptr));
    if (dtype == DType::kBFloat16) f(static_cast<const BFloat16*>(nullptr));
    if (dtype == DType::kFloat16) f(static_cast<const Float16*>(nullptr));
  }
}

template <typename T, typename Storage>
FLASH_ATTN_INLINE Vec<T> load_up_to(const Storage* p, int64_t count) {
  return count >= kLanes<T> ? load<T>(p) : load_partial<T>(p, count);
}

/// Numbers that make up one operand, as one lane: Operand itself, or pairs read as 32-bit words.
template <typename Operand, typename Storage>
FLASH_ATTN_INLINE Vec<Operand> load_operands(const Storage* row, int64_t operand, int64_t columns) {
  constexpr int W = kLanes<Operand>;
  if constexpr (std::is_same_v<Operand, uint32_t>) {
    const int64_t left = columns - 2 * operand;
    if (left >= 2 * W) return load_vector<Vec<Operand>>(row + 2 * operand);
    Storage lanes[2 * W];
    copy_partial<2 * W>(lanes, row + 2 * operand, left);
    return load_vector<Vec<Operand>>(lanes);
  } else {
    return load_up_to<Operand>(row + operand, columns - operand);
  }
}

template <typename Arithmetic, typename F>
FLASH_ATTN_INLINE void with_operand_storage(DType dtype, F f) {
  if constexpr (Arithmetic::kPack == 2) {
    f(static_cast<const BFloat16*>(nullptr));
  } else {
    with_storage<typename Arithmetic::Acc>(dtype, f);
  }
}

/// Operands along a row: dst (rows_padded, ld), ld >= columns / kPack rounded up to the lanes.
template <typename Arithmetic>
void pack_rows(const Rows& src, int64_t rows_padded, typename Arithmetic::Operand* dst, int64_t ld) {
  using Operand = typename Arithmetic::Operand;
  const int64_t operands = (src.columns + Arithmetic::kPack - 1) / Arithmetic::kPack;
  with_operand_storage<Arithmetic>(src.dtype, [&](auto type) {
    const auto* data = static_cast<decltype(type)>(src.data);
    for (int64_t r = 0; r < rows_padded; ++r) {
      const bool present = src.present(r);
      for (int64_t c = 0; c < ld; c += kLanes<Operand>) {
        const bool inside = present && c < operands;
        store_vector(dst + r * ld + c,
                     inside ? load_operands<Operand>(data + r * src.stride, c, src.columns) : Vec<Operand>{});
      }
    }
  });
}

/// Operands along a row, transposed: dst (columns / kPack, ld) with rows as lanes, for the lanes [0, rows_padded).
template <typename Arithmetic>
void pack_transposed(const Rows& src, int64_t rows_padded, typename Arithmetic::Operand* dst, int64_t ld) {
  using Operand = typename Arithmetic::Operand;
  constexpr int W = kLanes<Operand>;
  const int64_t operands = (src.columns + Arithmetic::kPack - 1) / Arithmetic::kPack;
  with_operand_storage<Arithmetic>(src.dtype, [&](auto type) {
    const auto* data = static_cast<decltype(type)>(src.data);
    constexpr bool kWords = kLoadsTransposed<Operand> && sizeof(*data) * Arithmetic::kPack == sizeof(Operand);
    for (int64_t r = 0; r < rows_padded; r += W) {
      for (int64_t c = 0; c < operands; c += W) {
        Vec<Operand> block[W];
        const bool whole = kWords && src.all_present(r, W) && (c + W) * Arithmetic::kPack <= src.columns;
        if constexpr (kWords) {
          if (whole) load_transposed(data + r * src.stride + c * Arithmetic::kPack, src.stride * sizeof(*data), block);
        }
        for (int i = 0; !whole && i < W; ++i) {
          block[i] =
              src.present(r + i) ? load_operands<Operand>(data + (r + i) * src.stride, c, src.columns) : Vec<Operand>{};
        }
        if (!whole) transpose<Operand>(block);
        const int64_t kept = min(W, operands - c);
        for (int64_t i = 0; i < kept; ++i) store_vector(dst + (c + i) * ld + r, block[i]);
      }
    }
  });
}

/// Numbers of the rows r and r + 1 from column c on, as pairs; rows and columns beyond are 0.
FLASH_ATTN_INLINE Words load_pairs_across(const Rows& src, int64_t r, int64_t c) {
  const auto words = [&](int64_t row) {
    if (!src.present(row) || c >= src.columns) return Words{};
    const BFloat16* p = static_cast<const BFloat16*>(src.data) + row * src.stride + c;
    if (src.columns - c >= kLanes<uint32_t>) return widen(load_vector<HalfWords>(p));
    BFloat16 lanes[kLanes<uint32_t>];
    copy_partial<kLanes<uint32_t>>(lanes, p, src.columns - c);
    return widen(load_vector<HalfWords>(lanes));
  };
  return words(r) | (words(r + 1) << 16);
}

/// Operands across rows: dst (rows_padded / kPack, ld), ld >= columns rounded up to the lanes.
template <typename Arithmetic>
void pack_across(const Rows& src, int64_t rows_padded, typename Arithmetic::Operand* dst, int64_t ld) {
  if constexpr (Arithmetic::kPack == 1) {
    pack_rows<Arithmetic>(src, rows_padded, dst, ld);
  } else {
    for (int64_t r = 0; r < rows_padded; r += 2) {
      for (int64_t c = 0; c < ld; c += kLanes<uint32_t>) {
        store_vector(dst + r / 2 * ld + c, load_pairs_across(src, r, c));
      }
    }
  }
}

/// Row `row` of a packed tile of operands across rows becomes 0.
template <typename Arithmetic>
void clear_row_across(typename Arithmetic::Operand* tile, int64_t ld, int64_t row) {
  using Operand = typename Arithmetic::Operand;
  Operand* operands = tile + row / Arithmetic::kPack * ld;
  if constexpr (Arithmetic::kPack == 1) {
    for (int64_t c = 0; c < ld; ++c) operands[c] = 0;
  } else {
    for (int64_t c = 0; c < ld; ++c) operands[c] &= row % 2 == 0 ? 0xffff0000u : 0x0000ffffu;
  }
}

#if defined(__AVX512F__)
/// 32 rows of bfloat16 from row r on, and their columns from c on: as pairs of rows, columns after columns, to dst
/// (columns, ld).
FLASH_ATTN_INLINE void turn_pairs(const Rows& src, int64_t r, int64_t c, int64_t columns, uint32_t* dst, int64_t ld) {
  constexpr int W = kLanes<uint32_t>;
  const BFloat16* from = static_cast<const BFloat16*>(src.data) + r * src.stride + c;
  int64_t stride = src.stride;
  BFloat16 copy[2 * W][2 * W];
  const int64_t left = src.columns - c;
  if (!src.all_present(r, 2 * W) || left < 2 * W) {
    for (int i = 0; i < 2 * W; ++i) {
      const BFloat16* row = from + i * stride;
      if (left <= 0 || !src.present(r + i)) {
        std::memset(copy[i], 0, sizeof(copy[i]));
      } else if (left < 2 * W) {
        copy_partial<2 * W>(copy[i], row, left);
      } else {
        std::memcpy(copy[i], row, sizeof(copy[i]));
      }
    }
    from = copy[0];
    stride = 2 * W;
  }
  Words even[W], odd[W];  // pairs of columns, rows as lanes
  load_transposed(from, 2 * stride * sizeof(BFloat16), even);
  load_transposed(from + stride, 2 * stride * sizeof(BFloat16), odd);
  for (int64_t i = 0; 2 * i < columns; ++i) {
    store_vector(dst + 2 * i * ld, blend_halves(even[i], odd[i] << 16));
    store_vector(dst + (2 * i + 1) * ld, blend_halves(even[i] >> 16, odd[i]));
  }
}
#endif

/// How the values of a tile lie as A of O^T = V^T P, whose sum is over their rows: packed once, they are read for every
/// block of queries.
constexpr Layout kValueLayout = kOnTiles ? Layout::kRowMajor : Layout::kDepthMajor;

/// Values as operands across rows, of which a tile has up to kRows: kDepthMajor as pack_across has it, with ld;
/// kRowMajor (ld, kRows / kPack). ld >= columns rounded up to the lanes.
template <typename Arithmetic, int64_t kRows>
void pack_values(const Rows& src, typename Arithmetic::Operand* dst, int64_t ld) {
  if constexpr (!kOnTiles) {
    pack_across<Arithmetic>(src, round_up(src.count, Arithmetic::kPack), dst, ld);
  } else {
    constexpr int64_t kSide = 2 * kLanes<uint32_t>;
    for (int64_t c = 0; c < ld; c += kSide) {
      for (int64_t r = 0; r < src.count; r += kSide) {
        turn_pairs(src, r, c, min(kSide, ld - c), dst + c * (kRows / 2) + r / 2, kRows / 2);
      }
    }
  }
}

/// The values of row `row` become 0.
template <typename Arithmetic, int64_t kRows>
void clear_value(typename Arithmetic::Operand* tile, int64_t ld, int64_t row) {
  if constexpr (!kOnTiles) {
    clear_row_across<Arithmetic>(tile, ld, row);
  } else {
    const uint32_t kept = row % 2 == 0 ? 0xffff0000u : 0x0000ffffu;
    for (int64_t c = 0; c < ld; ++c) tile[c * (kRows / 2) + row / 2] &= kept;
  }
}

template <typename T, typename Storage>
FLASH_ATTN_INLINE void store_up_to(Storage* p, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) {
    store<T>(p, v);
  } else {
    store_partial<T>(p, v, count);
  }
}

/// src (rows, ld) * factor -> dst rows of `dtype`.
template <typename T>
void store_rows(const T* src, int64_t ld, int64_t rows, int64_t columns, T factor, void* dst, DType dtype,
                int64_t stride) {
  with_storage<T>(dtype, [&](auto type) {
    using Storage = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; c += kLanes<T>) {
        store_up_to<T>(static_cast<Storage*>(dst) + r * stride + c, load<T>(src + r * ld + c) * factor, columns - c);
      }
    }
  });
}

/// src (columns, ld) with rows as lanes, times factor (rows), -> dst rows of `dtype`; a factor of 0 gives 0. src has
/// columns rounded up to the lanes.
template <typename T>
void store_transposed(const T* src, int64_t ld, int64_t rows, int64_t columns, const T* factor, void* dst, DType dtype,
                      int64_t stride) {
  constexpr int W = kLanes<T>;
  with_storage<T>(dtype, [&](auto type) {
    using Storage = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    for (int64_t r = 0; r < rows; r += W) {
      for (int64_t c = 0; c < columns; c += W) {
        Vec<T> block[W];
        if constexpr (kLoadsTransposed<T>) {
          load_transposed(src + c * ld + r, ld * sizeof(T), block);
        } else {
          for (int i = 0; i < W; ++i) block[i] = load<T>(src + (c + i) * ld + r);
          transpose<T>(block);
        }
        const int64_t kept = min(W, rows - r);
        for (int64_t i = 0; i < kept; ++i) {
          const T scale = factor[r + i];
          store_up_to<T>(static_cast<Storage*>(dst) + (r + i) * stride + c, scale == T(0) ? Vec<T>{} : block[i] * scale,
                         columns - c);
        }
      }
    }
  });
}

/// Rows [0, rows) of a tensor become 0. Every dtype's 0 is all zero bits.
inline void clear_rows(void* dst, DType dtype, int64_t rows, int64_t columns, int64_t stride) {
  for (int64_t r = 0; columns > 0 && r < rows; ++r) {
    std::memset(static_cast<char*>(dst) + r * stride * size_of(dtype), 0, size_t(columns * size_of(dtype)));
  }
}

/// The same of all heads of a packed tensor, for its rows [begin, end).
inline void clear_packed_rows(const TensorView& tensor, DType dtype, int64_t begin, int64_t end, int64_t heads,
                              int64_t columns) {
  for (int64_t h = 0; h < heads; ++h) {
    char* row = static_cast<char*>(tensor.data) + (begin * tensor.row + h * tensor.head) * size_of(dtype);
    clear_rows(row, dtype, end - begin, columns, tensor.row);
  }
}

}  // namespace
}  // namespace flash_attn::cpu
