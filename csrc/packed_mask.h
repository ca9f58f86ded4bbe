// A dense attn_mask read once: what of it hides whole tiles, what hides nothing, and the rest as bits in the order of
// accumulator fragments. Its cost and its memory follow the mask's own sizes: a dimension that is broadcast keeps its
// size of 1.
#pragma once

#include "host_device.h"
#include "params.h"

namespace flash_attn::mask {

constexpr int kCellRows = 16, kCellCols = 64;
constexpr int kClassRows = 8 * kCellRows;  // of a word of classes

// What a cell or a tile holds, any of them together. Numbers of tiles are those of their cells, or-ed.
constexpr uint32_t kSeen = 1;    // a score that is seen: without, the tile is skipped
constexpr uint32_t kHidden = 2;  // one that is hidden: without, the mask says nothing but what is added
constexpr uint32_t kBiased = 4;  // a seen one that something is added to: without, no value has to be read

/// Cells of 16 rows x 64 columns, (batch | 1, heads | 1, row_cells, col_cells). What lies beyond the mask's sizes
/// counts as neither seen nor hidden in a class, and is not seen in bits.
struct PackedMask {
  // (cells, 32): bit 8 (n / 2) + 4 (n % 2) + i of lane 4 g + t says whether row g + 8 (i / 2) sees column
  // 8 n + 2 t + i % 2, as accumulator fragments of m16n8 lie.
  uint32_t* bits = nullptr;
  uint64_t* seen = nullptr;  // (cells): a bit a column, whether some row sees it; null: there is no packed mask
  // (batch | 1, heads | 1, row_groups, col_cells): a byte for each of eight row cells, the first lowest. A row that is
  // broadcast stands for all eight.
  uint64_t* classes = nullptr;
  int64_t batch = 0, head = 0;              // in cells; 0 where broadcast
  int64_t class_batch = 0, class_head = 0;  // in words of classes; likewise
  int row_cells = 0, col_cells = 0;
  int row_step = 0, col_step = 0;  // 1, or 0 where broadcast

  FLASH_ATTN_HOST_DEVICE int64_t cell(int64_t b, int64_t h, int row_cell, int col_cell) const {
    return b * batch + h * head + int64_t{row_cell * row_step} * col_cells + col_cell * col_step;
  }

  /// One score's bit; for those who have no fragments.
  FLASH_ATTN_HOST_DEVICE bool sees(int64_t b, int64_t h, int64_t row, int64_t col) const {
    const int r = int(row % kCellRows), c = int(col % kCellCols);
    const uint32_t word = bits[cell(b, h, int(row / kCellRows), int(col / kCellCols)) * 32 + r % 8 * 4 + c % 8 / 2];
    return (word >> (c / 8 * 4 + r / 8 * 2 + c % 2) & 1) != 0;
  }

  /// Of rows from kClassRows * row_group on and the columns of one cell.
  FLASH_ATTN_HOST_DEVICE uint64_t class_word(int64_t b, int64_t h, int row_group, int col_cell) const {
    return classes[b * class_batch + h * class_head + int64_t{row_group * row_step} * col_cells + col_cell * col_step];
  }

  /// kSeen, kHidden and kBiased of kRows rows from `row` on, a multiple of the smaller of kRows and kClassRows, and
  /// kCols columns from `col` on, likewise of kCols and kCellCols: those of the cells that the tile lies in.
  template <int kRows, int kCols>
  FLASH_ATTN_HOST_DEVICE uint32_t tile_classes(int64_t b, int64_t h, int row, int col) const {
    static_assert(kRows % kCellRows == 0 && (kClassRows % kRows == 0 || kRows % kClassRows == 0));
    static_assert(kCellCols % kCols == 0 || kCols % kCellCols == 0);
    constexpr int kGroups = (kRows + kClassRows - 1) / kClassRows, kCells = (kCols + kCellCols - 1) / kCellCols;
    uint64_t word = 0;
    for (int g = 0; g < kGroups; ++g) {
      for (int c = 0; c < kCells; ++c) {
        const int row_group = row / kClassRows + g, col_cell = col / kCellCols + c;
        const bool exists = (row_step == 0 || row_group * (kClassRows / kCellRows) < row_cells) &&
                            (col_step == 0 || col_cell < col_cells);
        if (exists) word |= class_word(b, h, row_group, col_cell);
      }
    }
    if constexpr (kRows < kClassRows) {
      word = word >> (row % kClassRows / kCellRows * 8) & ((uint64_t{1} << (kRows / kCellRows * 8 % 64)) - 1);
    }
    uint32_t x = static_cast<uint32_t>(word) | static_cast<uint32_t>(word >> 32);
    x |= x >> 16;
    return (x | x >> 8) & 7;
  }
};

FLASH_ATTN_HOST_DEVICE int64_t units(int64_t n, int unit) { return (n + unit - 1) / unit; }
FLASH_ATTN_HOST_DEVICE int64_t row_cells(const MaskView& view) { return units(view.row_size, kCellRows); }
FLASH_ATTN_HOST_DEVICE int64_t col_cells(const MaskView& view) { return units(view.col_size, kCellCols); }
FLASH_ATTN_HOST_DEVICE int64_t row_groups(const MaskView& view) { return units(view.row_size, kClassRows); }

// The three parts lie one after the other, each from a multiple of 256 bytes on.
FLASH_ATTN_HOST_DEVICE int64_t aligned_part(int64_t bytes) { return units(bytes, 256) * 256; }
FLASH_ATTN_HOST_DEVICE int64_t seen_bytes(const MaskView& view) {
  return aligned_part(8 * view.batch_size * view.head_size * row_cells(view) * col_cells(view));
}
FLASH_ATTN_HOST_DEVICE int64_t class_bytes(const MaskView& view) {
  return aligned_part(8 * view.batch_size * view.head_size * row_groups(view) * col_cells(view));
}

/// Bytes of a packed mask.
FLASH_ATTN_HOST_DEVICE int64_t packed_bytes(const MaskView& view) {
  return seen_bytes(view) + class_bytes(view) +
         aligned_part(128 * view.batch_size * view.head_size * row_cells(view) * col_cells(view));
}

/// Of scratch that a pass needs for it: none if it was packed before.
FLASH_ATTN_HOST_DEVICE int64_t packing_workspace(const MaskView& view) {
  return view.packed != nullptr ? 0 : packed_bytes(view);
}

/// A packed mask that lies at `data`.
FLASH_ATTN_HOST_DEVICE PackedMask place_packed(const MaskView& view, void* data) {
  PackedMask packed;
  char* const bytes = static_cast<char*>(data);
  packed.seen = reinterpret_cast<uint64_t*>(bytes);
  packed.classes = reinterpret_cast<uint64_t*>(bytes + seen_bytes(view));
  packed.bits = reinterpret_cast<uint32_t*>(bytes + seen_bytes(view) + class_bytes(view));
  packed.row_cells = static_cast<int>(row_cells(view));
  packed.col_cells = static_cast<int>(col_cells(view));
  packed.row_step = view.row_size == 1 ? 0 : 1;
  packed.col_step = view.col_size == 1 ? 0 : 1;
  const int64_t cells = int64_t{packed.row_cells} * packed.col_cells, words = row_groups(view) * packed.col_cells;
  packed.head = view.head_size == 1 ? 0 : cells;
  packed.class_head = view.head_size == 1 ? 0 : words;
  packed.batch = view.batch_size == 1 ? 0 : cells * view.head_size;
  packed.class_batch = view.batch_size == 1 ? 0 : words * view.head_size;
  return packed;
}

}  // namespace flash_attn::mask
