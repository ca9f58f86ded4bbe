// Tensor maps: how the copy engine (TMA) finds and clips the rows of one sequence.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../../../params.h"

namespace flash_attn::cuda::sm90 {

/// Rows of q, k, v or out: (batch, rows, heads, head_dim), unit stride along head_dim.
struct TensorMapSource {
  TensorView view;
  DType dtype;
  int64_t batch;     // 1 with cu_seqlens
  int64_t rows;      // of the tensor, or of one batch entry
  int64_t max_rows;  // of one sequence
  int64_t heads, head_dim;
};

/// A tensor of a row for each query; of `heads` rows for each key.
TensorMapSource query_rows(const ForwardParams& params, const TensorView& view, int64_t head_dim);
TensorMapSource key_rows(const ForwardParams& params, const TensorView& view, int64_t heads, int64_t head_dim);

/// A map whose boxes end where a sequence ends, though the tensor goes on: reads beyond are zero, writes are dropped.
///
/// The row is split into two dimensions, x and y, with the same stride, and the base address is moved back by max_rows
/// rows: box (x, y) starts at row x + y - max_rows. A box that starts at row r of a sequence that ends before row e has
/// y = e and x = max_rows - (e - r): x leaves its dimension, whose size is max_rows, exactly at row e. Only addresses
/// inside the bounds are accessed, so the moved base needs no memory behind it - but a box wholly out of bounds touches
/// the base itself: none may be loaded (storing one is harmless): benchmarks/experiments/023.
///
/// Dimensions (head_dim, x, y, heads, batch); a box is 64 columns of `box_rows` rows, written in the 128-byte swizzle.
/// Columns from head_dim on are zero as well. Throws std::runtime_error when the driver rejects the map.
CUtensorMap make_tensor_map(const TensorMapSource& source, int box_rows);

/// Of an additive attn_mask of 16-bit elements: dimensions (keys, queries, heads, batch, 1); a box is 64 keys of
/// `box_rows` queries, written in the 128-byte swizzle. What lies beyond the mask's sizes is zero. Throws
/// std::runtime_error when the driver rejects the map.
CUtensorMap make_mask_map(const MaskView& mask, int box_rows);
/// Whether there is such a map: rows of q's dtype in whole, aligned pieces of 16 bytes, or one that is broadcast.
bool has_mask_map(const ForwardParams& params);

/// Why no map can hold the tensor, as a clause; null if one can.
const char* tensor_map_refuses(const TensorMapSource& source);

}  // namespace flash_attn::cuda::sm90
