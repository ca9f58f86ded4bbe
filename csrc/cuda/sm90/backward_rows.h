// What the backward pass does row by row: statistics and zeros before the main kernel, dq, dk and dv after it.
#pragma once

#include <cuda_runtime_api.h>

#include "../../params.h"

namespace flash_attn::sm90 {

struct PackedBlock;

struct PackedBlocksParams {
  PackedBlock* blocks;  // (num_blocks + 1), see BackwardSchedule; null without cu_seqlens_k
  int num_blocks, block_n;
  int heads;        // tiles beside a block of keys
  int last_blocks;  // PackedBlock::in_last: fewer than these come after the sequence
};

struct BackwardRowsParams {
  BackwardParams problem;
  int block_m, dq_columns;       // of the main kernel's tiles
  int num_blocks, num_m_blocks;  // see BackwardKernelParams
  float* dq_accum;               // (num_heads * num_blocks, block_m * dq_columns)
  float dq_scale;                // dq over dq_accum
  bool zeroes_dq;                // dq_accum, which is undefined else
  uint4* statistics;             // (num_heads * num_blocks, block_m)
  // The main kernel prepares the rows of other heads itself: of batch * num_heads, or of those whose tiles' numbers
  // (BackwardTilePlace) are lower than prepared_tiles, if that is not 0.
  int64_t prepared_heads, prepared_tiles;
  uint4* cleared;  // (num_cleared), counters of the main kernel
  int64_t num_cleared;
  PackedBlocksParams packed_blocks;
};

/// Of the first heads or tiles, writes statistics (backward_statistics.h) from out, dout, lse and dlse and, with
/// zeroes_dq, 0 to dq_accum. Writes 0 to the counters.
/// With cu_seqlens also clears the rows of dq, dk and dv that belong to no sequence, and lists the blocks of keys.
void launch_prepare_rows(const BackwardRowsParams& params, cudaStream_t stream);

/// What a key head's tiles have stored of dk and dv, (rows of k, num_heads_k * num_parts, columns): see stored_parts().
struct BackwardKeyPartsParams {
  BackwardParams problem;
  TensorView dk_parts, dv_parts;
  int num_parts;
};

/// Adds them up, in order.
void launch_add_key_parts(const BackwardKeyPartsParams& params, cudaStream_t stream);

/// dq = dq_scale * dq_accum.
void launch_store_dq(const BackwardRowsParams& params, cudaStream_t stream);

}  // namespace flash_attn::sm90
