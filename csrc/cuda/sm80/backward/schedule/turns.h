// dQ of a block of query rows is a sum over blocks of keys, each a thread block's. They add as they come, or one after
// the other, so that the sum is the same every time. The order is that in which they would come if all began at once
// and took as long for each step, so that nobody waits long:
//
//   causal, windows     A block of keys begins with the first query rows that see it: the later the keys, the earlier
//                       it comes to any row. By falling keys.
//   all see all         `spread` neighbours begin with query rows at even distances, and go on from the first ones
//   after
//                       the last. From the one that begins with the rows, or last before them, by falling keys; then
//                       those that begin after them, also falling. Groups of `spread` one after the other.
//
// A warp adds the same elements of every block of query rows, so that each has a counter of its own. A block's number
// is drawn from a counter as it starts, and falling blocks are numbered so: those whose turn comes before it have
// started, and waiting for them ends. Of a group some whose turn comes before have not, but run as soon as there is
// room for the whole group, which waits for nothing but groups before it.
#pragma once

#include "../tile.h"

namespace flash_attn::cuda::sm80 {

/// A lane's four numbers of a fragment, from dq_place(lane, 0) on.
SM80_DEVICE void add_fragment(float* to, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to + dq_place(0, i)), "f"(x[i]) : "memory");
  }
#endif
}

/// This tile's turn at a block of query rows: how many blocks of keys come before it.
SM80_DEVICE int turn_of(const BackwardKernelParams& params, const BackwardTile& tile, int m_block) {
  if (params.spread > 0) {
    const int in_group = tile.n_block % params.spread, before = tile.n_block - in_group;
    const int group = min(params.spread, params.num_n_blocks - before);
    const int first = ((m_block + 1) * group - 1) / params.num_m_blocks;  // begins with m_block, or last before it
    return before + (first >= in_group ? first - in_group : first - in_group + group);
  }
  const int last_row = min((m_block + 1) * params.block_m, int(tile.sequence.seqlen_q)) - 1;
  const int last_key = min(int(tile.sequence.seqlen_k) - 1, last_row + tile.high + tile.n_begin);
  return last_key / params.block_n - tile.n_block;
}

/// How many have added, by one lane. Relaxed: nothing is read that they wrote, and what is added after the answer,
/// which it depends on, comes after what they added.
SM80_DEVICE int count_turns(const int* counter) {
  int count;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  return count;
}

/// By a warp: until its turn has come; `count` is what the first lane has seen before.
SM80_DEVICE void await_turn(const int* counter, int turn, int count) {
  if (threadIdx.x % 32 == 0) {
    while (count < turn) count = count_turns(counter);
  }
  __syncwarp();
}

/// By a warp: what it has added is there for the next turn. The first lane knows the counter.
SM80_DEVICE void end_turn(int*& counter) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    asm volatile("fence.acq_rel.gpu;\nred.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
  }
}

}  // namespace flash_attn::cuda::sm80
