// What the backward kernels are given, and where things lie in the workspace.
//
// Query rows of a sequence are cut into blocks of block_m; all sequences' blocks are numbered together, those of packed
// ones as common/tiles/sequence_blocks.h says; likewise blocks of keys.
#pragma once

#include "../../../sequence.h"
#include "../../mask/packed_mask.h"

namespace flash_attn::cuda::sm80 {

/// Bytes of q or dout from one head, one row and one block of rows to the next.
struct QuerySteps {
  int64_t head, row, block;
};

struct BackwardKernelParams {
  BackwardParams problem;
  int block_m, block_n;                       // rows of a block of queries, of keys
  int num_m_blocks, num_n_blocks;             // of a sequence; of packed ones, of all together
  int columns;                                // of dq_accum: the head dimension that the kernel is for
  float scale_log2;                           // softmax_scale / ln 2
  float lse_factor;                           // 1 / ln 2 if P is taken as a power of 2, or 1
  float scale_over_softcap, inverse_softcap;  // 0: no softcap
  mask::PackedMask packed;                    // seen null: attn_mask, if any, is read where it lies
  // With turns, see turns.h: blocks of keys are numbered from the last; or so many neighbours begin with different
  // query blocks.
  bool falls;
  int spread;
  bool aligned;  // rows of all tensors consist of whole, aligned pieces of 16 bytes
  QuerySteps q, dout;
  bool adds_mask_gradient;  // each dS to attn_mask's gradient, as it comes
  // Blocks of keys of the batch's entries follow each other, which add to the same part of attn_mask's gradient: it
  // stays in L2 until all have.
  bool entries_beside;
  // Workspace. A query head's blocks lie together, those of (batch, head) by batch and then head.
  float* dq_accum;  // (heads, blocks, block_m x columns), a block in the order of accumulator fragments, see dq_place()
  float* minus_lse;    // (heads, blocks, block_m), times lse_factor; -inf: the row sees nothing, or does not exist
  float* minus_delta;  // likewise: dlse less the sum of dout * out over the row
  int* turns;  // (heads, blocks, warps): how many blocks of keys have added to dq_accum; null: they do as they come
  float* slope_sums;  // (heads, blocks of keys, warps): sums of dS times distance; null: not wanted
  int* next_tile;     // with turns: the number of blocks that have started
  int share_rows;     // of a block of query rows that a thread block has before and after the kernel on tiles
  // Where a block of keys has several thread blocks, each with a part of the query rows that see it: (blocks of keys,
  // parts, block_n x columns), in the order of dq_accum; no part: 1, null.
  int parts;
  float *dk_parts, *dv_parts;
};

struct MaskGradientParams {
  BackwardKernelParams kernel;
  int m_blocks, n_blocks;  // tiles of the mask
  int64_t first_block;
};

}  // namespace flash_attn::cuda::sm80
