// What the backward pass does row by row before the main kernel: statistics, zeros, the list of packed blocks.
#pragma once

#include <cuda_runtime_api.h>

#include "../../../../mask_kind.h"
#include "../../../../params.h"
#include "../../../common/tiles/sequence_blocks.h"
#include "../extended/params.h"

namespace flash_attn::cuda::sm90::backward {

struct PackedBlock;
union BlockCounters;

struct PackedBlocksParams {
  PackedBlock* blocks;  // (num_blocks + 1), see Schedule; null without cu_seqlens_k
  int num_blocks, block_n;
  int heads;        // tiles beside a block of keys
  int last_blocks;  // PackedBlock::in_last: fewer than these come after the sequence
};

/// A boolean attn_mask from which further CTAs make classes of tiles, one each; count 0: none does.
struct UnpackedMask {
  TileClasses classes;
  int key_blocks, query_blocks, count;
};

struct RowsParams {
  BackwardParams problem;
  int block_m, dq_columns;       // of the main kernel's tiles
  SequenceBlocks m_blocks;       // of block_m query rows, to launch CTAs by
  int num_blocks, num_m_blocks;  // see KernelParams
  float* dq_accum;               // (num_heads * num_blocks, block_m * dq_columns)
  float dq_scale;                // dq over dq_accum
  bool zeroes_dq;                // dq_accum, which is undefined else
  uint4* statistics;             // (num_heads * num_blocks, block_m)
  // Of the kernels of extended/, instead: floats (num_heads * num_blocks, 4, block_m), minus lse to the base 2 (-inf:
  // the row sees nothing), minus delta, minus lse, and minus what is lost of it to the base 2, see lost_of_lse.h; and
  // for each 64 rows whether one of them sees nothing.
  bool extended;
  int* blind;  // (num_heads * num_blocks, block_m / 64)
  // The main kernel prepares the rows of other heads itself: of batch * num_heads, or of those whose tiles' numbers
  // (TilePlace) are lower than prepared_tiles, if that is not 0.
  int64_t prepared_heads, prepared_tiles;
  uint4* cleared;  // (num_cleared), counters of the main kernel
  int64_t num_cleared;
  PackedBlocksParams packed_blocks;
  mask::KindCondition condition;
  UnpackedMask unpacked_mask;
  const BlockCounters* dq_counters;  // of extended/: 0 where no tile has stored anything; null: dq_accum was 0 at first
};

/// Of the first heads or tiles, writes statistics (preprocess/statistics.h) from out, dout, lse and dlse and, with
/// zeroes_dq, 0 to dq_accum. Writes 0 to the counters.
/// With cu_seqlens also clears the rows of dq, dk and dv that belong to no sequence, and lists the blocks of keys.
void launch_preprocess(const RowsParams& params, cudaStream_t stream);

}  // namespace flash_attn::cuda::sm90::backward
