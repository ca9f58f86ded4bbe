// dQ of a block of query rows is a sum over blocks of keys, each a thread block's. They add as they come, or one after
// the other by rising keys, so that the sum is the same every time.
//
// A warp adds the same elements of every block of query rows, so that each has a counter of its own. A block's number
// is drawn from a counter as it starts: those whose turn comes before it have started, and waiting for them ends.
#pragma once

#include "tile.h"

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

/// This tile's turn at the block of query rows from m_begin on: how many blocks of keys come before it.
SM80_DEVICE int turn_of(const BackwardTile& tile, int m_begin, int block_n) {
  return tile.n_block - max(0, m_begin + tile.low + tile.n_begin) / block_n;  // from the first key that is seen
}

/// By a warp: until its turn has come.
SM80_DEVICE void await_turn(const int* counter, int turn) {
  if (threadIdx.x % 32 == 0) {
    int count;
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    } while (count < turn);
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
