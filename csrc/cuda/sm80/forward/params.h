// What a forward kernel is given.
#pragma once

#include "../../../params.h"
#include "../../common/tiles/schedule.h"
#include "../../mask/packed_mask.h"

namespace flash_attn::cuda::sm80 {

struct ForwardKernelParams {
  ForwardParams problem;
  int64_t first_block;
  TileSchedule schedule;  // packed: num_m_blocks of all sequences together, and tiles head by head
  // Bytes between rows of K and V that a thread copies one after the other, and between tiles.
  int64_t k_copy_step, v_copy_step, k_tile_step, v_tile_step;
  int64_t mask_row;         // bytes between rows of attn_mask, for kernels of Rules::kBias
  bool falls;               // packed: the last query rows come first
  bool aligned;             // q, k and v consist of whole 16-byte pieces
  mask::PackedMask packed;  // seen null: attn_mask, if any, is read where it lies
  int seen_words;           // of `packed` that a block keeps in shared memory, 64 columns each
  bool mask_pairs;          // columns 2 j and 2 j + 1 of an additive mask are one aligned word
};

}  // namespace flash_attn::cuda::sm80
