// Work on rows, before and after the kernels on tiles: filling what no tile covers, the rows' statistics that the
// backward pass needs, and sums over rows.
#pragma once

#include <cuda_runtime_api.h>

#include "../../params.h"

namespace flash_attn::cuda::universal {

/// A place for each (head, row of all of q): head * total_q + row.
struct RowWorkspace {
  void* lse;        // 0 for a row that sees nothing
  void* lost;       // of lse: see common/scores/lost_of_lse.h
  void* delta;      // sum of dout * out over the row - dlse
  void* slope_sum;  // sum of dS * distance over the row; null: not wanted
  static int64_t bytes(const BackwardParams& params);
  static RowWorkspace in(const BackwardParams& params);
};

/// All rows of a tensor become 0: (batch, rows, heads, columns), with `packed` (rows, heads, columns).
void fill_rows(const TensorView& view, DType dtype, int64_t batch, int64_t rows, int64_t heads, int64_t columns,
               cudaStream_t stream);
/// All of lse becomes -inf.
void fill_lse(const ForwardParams& params, cudaStream_t stream);

/// Rows of dq, dk, dv that may belong to no sequence become 0: the kernels write those that take part alone.
void fill_gradients(const BackwardParams& params, cudaStream_t stream);

/// Fills RowWorkspace's lse, lost and delta. Where something is lost of a row's lse, its place in `flags`, if any, by
/// batch and head of k, becomes 1.
void prepare_rows(const BackwardParams& params, int* flags, cudaStream_t stream);
/// dsinks and dslopes from what stands in RowWorkspace, if wanted.
void reduce_rows(const BackwardParams& params, cudaStream_t stream);

}  // namespace flash_attn::cuda::universal
