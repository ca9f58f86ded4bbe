// What a backward kernel for float32 is given.
#pragma once

#include "../../../mask/packed_mask.h"
#include "../../../universal/rows.h"
#include "../planes.h"

namespace flash_attn::cuda::sm80::fp32 {

struct BackwardKernelParams {
  BackwardParams problem;
  universal::RowWorkspace rows;  // lse and delta
  Planes q, k, v, dout;
  mask::PackedMask packed;         // seen null: attn_mask, if any, is read where it lies
  float* dmask;                    // null: not for this launch. Zeros, to which dS is added.
  const int* flags;                // (batch, KV heads): not 0 is left to the universal kernels
  SequenceBlocks blocks;           // of the rows that the kernel's blocks own
  int64_t first_block;             // see launch_blocks()
  int group_size;                  // query heads of a KV head
  bool pairs_q, pairs_k, pairs_v;  // two neighbours of dq, dk, dv are one aligned piece
};

}  // namespace flash_attn::cuda::sm80::fp32
