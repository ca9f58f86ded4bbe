// Which packed sequence a block of rows belongs to.
#pragma once

#include "../common/tiles/sequence_blocks.h"
#include "mma.h"

namespace flash_attn::cuda::sm80 {

/// A block of packed or of dense sequences.
struct BlockPlace {
  int batch, block;  // block: in its sequence
};

/// Of the block with this number in the list of common/tiles/sequence_blocks.h; before the first sequence's, a negative
/// block. All lanes of a warp search together.
SM80_DEVICE BlockPlace find_packed_block(const int32_t* cu_seqlens, int64_t total, int batch, int block_rows,
                                         int number) {
  const int lane = int(threadIdx.x) % 32;
  const auto first_block = [&](int b) {
    return int(first_packed_block(clamp<int64_t>(cu_seqlens[b], 0, total), b, block_rows));
  };
  int low = 0, count = batch;  // the last sequence whose first block is not after `number`
  while (count > 1) {
    const int step = (count + 31) / 32;
    const bool before = lane * step < count && first_block(low + lane * step) <= number;
    const int at = 31 - __clz(int(__ballot_sync(~0u, before) | 1u));
    low += at * step;
    count = min(step, count - at * step);
  }
  return {low, number - first_block(low)};
}

}  // namespace flash_attn::cuda::sm80
