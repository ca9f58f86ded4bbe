// What a forward kernel is given.
#pragma once

#include "../../../params.h"
#include "../../mask/packed_mask.h"

namespace flash_attn::cuda::sm80 {

struct ForwardKernelParams {
  ForwardParams problem;
  int64_t first_block;
  int num_m_blocks;         // of the longest sequence; with cu_seqlens_q, a bound for all sequences together
  int group_size;           // query heads of a KV head
  int heads_per_group;      // (batch, head) pairs whose keys and values stay in L2 together; dense problems alone
  int slots;                // of shared memory for tiles of K and V
  bool longest_first;       // the last query rows see the most keys
  bool aligned;             // q, k and v consist of whole 16-byte pieces
  mask::PackedMask packed;  // seen null: attn_mask, if any, is read where it lies
  int seen_words;           // of `packed` that a block keeps in shared memory, 64 columns each
  bool mask_pairs;          // columns 2 j and 2 j + 1 of an additive mask are one aligned word
};

}  // namespace flash_attn::cuda::sm80
