// Packing attn_mask on the CPU, see packed_mask.h for what comes out.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../mask_kind.h"
#include "cpu.h"
#include "parallel.h"

namespace flash_attn::cpu {
namespace {

using mask::kCellCols, mask::kCellRows;

constexpr int kRowCells = mask::kClassRows / kCellRows;  // of a word of classes

/// What a value does, as mask::kSeen and mask::kBiased.
template <typename Number>
uint32_t effect(Number x) {
  return x == -Number(INFINITY) ? 0 : x == Number(0) ? mask::kSeen : mask::kSeen | mask::kBiased;
}

uint32_t effect_of_bits(uint32_t x, uint32_t minus_infinity, uint32_t magnitude) {
  return x == minus_infinity ? 0 : (x & magnitude) == 0 ? mask::kSeen : mask::kSeen | mask::kBiased;
}

uint32_t effect_at(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBool: return static_cast<const uint8_t*>(data)[i] != 0 ? mask::kSeen : 0;
    case DType::kFloat64: return effect(static_cast<const double*>(data)[i]);
    case DType::kFloat32: return effect(static_cast<const float*>(data)[i]);
    case DType::kBFloat16: return effect_of_bits(static_cast<const uint16_t*>(data)[i], 0xff80, 0x7fff);
    default: return effect_of_bits(static_cast<const uint16_t*>(data)[i], 0xfc00, 0x7fff);
  }
}

struct Packing {
  MaskView view;
  mask::PackedMask packed;
  int64_t row_groups;
};

/// A cell's bits of one row that exists, and its part of the cell's class.
uint32_t pack_row(const Packing& p, int64_t origin, int r, int64_t columns, uint32_t* bits, uint64_t& seen) {
  uint64_t row = 0;
  uint32_t all = 0;
  for (int64_t c = 0; c < columns; ++c) {
    const uint32_t e = effect_at(p.view.data, p.view.dtype, origin + c * p.view.col);
    row |= uint64_t{e & mask::kSeen} << c;
    all |= e | (e == 0 ? mask::kHidden : 0);
  }
  seen |= row;
  for (int t = 0; t < 4; ++t) {
    uint32_t word = 0;
    for (int n = 0; n < kCellCols / 8; ++n) word |= uint32_t(row >> (8 * n + 2 * t) & 3) << (4 * n + r / 8 * 2);
    bits[4 * (r % 8) + t] |= word;
  }
  return all;
}

uint32_t pack_cell(const Packing& p, int64_t slice, int64_t row_cell, int64_t col_cell) {
  const MaskView& view = p.view;
  const int64_t cell = (slice * p.packed.row_cells + row_cell) * p.packed.col_cells + col_cell;
  uint32_t* const bits = p.packed.bits + cell * 32;
  std::fill(bits, bits + 32, 0);
  uint64_t seen = 0;
  uint32_t all = 0;
  // A broadcast row or column stands for all; its stride is 0.
  const int64_t columns =
      view.col_size == 1 ? kCellCols : std::min<int64_t>(kCellCols, view.col_size - col_cell * kCellCols);
  const int64_t rows =
      view.row_size == 1 ? kCellRows : std::min<int64_t>(kCellRows, view.row_size - row_cell * kCellRows);
  for (int r = 0; r < rows; ++r) {
    const int64_t origin = slice / view.head_size * view.batch + slice % view.head_size * view.head +
                           (row_cell * kCellRows + r) * view.row + col_cell * kCellCols * view.col;
    all |= pack_row(p, origin, r, columns, bits, seen);
  }
  p.packed.seen[cell] = seen;
  return all;
}

/// A row of words of classes.
void pack_task(const void* context, int64_t index, void*) {
  const Packing& p = *static_cast<const Packing*>(context);
  const int64_t slice = index / p.row_groups, row_group = index % p.row_groups;
  for (int64_t col_cell = 0; col_cell < p.packed.col_cells; ++col_cell) {
    uint64_t word = 0;
    for (int i = 0; i < kRowCells; ++i) {
      const int64_t row_cell = row_group * kRowCells + i;
      if (row_cell >= p.packed.row_cells) break;
      word |= uint64_t{pack_cell(p, slice, row_cell, col_cell)} << (8 * i);
    }
    if (p.view.row_size == 1) word *= 0x0101010101010101;
    p.packed.classes[index * p.packed.col_cells + col_cell] = word;
  }
}

}  // namespace

void pack_mask(const MaskView& view, void* data, void*) {
  const Packing packing{view, mask::place_packed(view, data), mask::row_groups(view)};
  run_tasks(view.batch_size * view.head_size * packing.row_groups, 0, pack_task, &packing);
  mask::MaskKind* const kind = mask::place_kind(view, data);
  std::memset(static_cast<void*>(kind), 0, mask::kKindBytes);  // nobody looks for a band
  const int64_t words = view.batch_size * view.head_size * packing.row_groups * packing.packed.col_cells;
  const auto is_biased = [](uint64_t word) { return (word & mask::kBiased * 0x0101010101010101) != 0; };
  if (std::any_of(packing.packed.classes, packing.packed.classes + words, is_biased)) {
    kind->biased = kind->band_or_biased = mask::kPreparedMark;
  }
}

}  // namespace flash_attn::cpu
