// A dense attn_mask read once: as bits in the order of accumulator fragments, and which columns of which rows are seen
// at all. Its cost and its memory follow the mask's own sizes: a dimension that is broadcast keeps its size of 1.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../host_device.h"
#include "../../params.h"

namespace flash_attn::cuda::mask {

constexpr int kCellRows = 16, kCellCols = 64;

/// Cells of 16 rows x 64 columns, (batch | 1, heads | 1, row_cells, col_cells).
struct PackedMask {
  // (cells, 32): bit 8 (n / 2) + 4 (n % 2) + i of lane 4 g + t says whether row g + 8 (i / 2) sees column
  // 8 n + 2 t + i % 2, as accumulator fragments of m16n8 lie. Null: not wanted.
  uint32_t* bits = nullptr;
  uint64_t* seen = nullptr;     // (cells): a bit a column, whether some row sees it
  int64_t batch = 0, head = 0;  // in cells; 0 where broadcast
  int row_cells = 0, col_cells = 0;
  int row_step = 0, col_step = 0;  // 1, or 0 where broadcast

  FLASH_ATTN_HOST_DEVICE int64_t cell(int64_t b, int64_t h, int row_cell, int col_cell) const {
    return b * batch + h * head + int64_t{row_cell * row_step} * col_cells + col_cell * col_step;
  }
};

/// Cells of `view` as a mask of rows x columns.
int64_t num_cells(const MaskView& view);
/// Bytes that a packed mask takes, its two parts each aligned to 256 bytes.
int64_t packed_bytes(const MaskView& view, bool with_bits);
/// The mask packed into `workspace`.
PackedMask place_packed(const MaskView& view, bool with_bits, void* workspace);
/// Fills it; an additive mask is seen where it is not -inf.
void pack(const MaskView& view, const PackedMask& packed, cudaStream_t stream);

}  // namespace flash_attn::cuda::mask
