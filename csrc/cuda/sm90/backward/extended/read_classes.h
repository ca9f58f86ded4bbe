// Classes and bits of tiles (TileClasses) from a boolean attn_mask that nobody has packed: beside the preparation of
// rows, so that a small mask costs no launch of its own.
#pragma once

#include "../../../common/ptx.h"
#include "../preprocess/preprocess.h"
#include "classes.h"

namespace flash_attn::cuda::sm90::backward {

/// By a CTA of 8 warps, of block `number` of mask.count. A lane's word of bits as classes.cu has it from a packed mask.
FLASH_ATTN_DEVICE void read_tile_classes(const MaskView& view, const UnpackedMask& mask, int block_m, int number) {
  const int query_block = number % mask.query_blocks, others = number / mask.query_blocks;
  const int key_block = others % mask.key_blocks, slice = others / mask.key_blocks;
  const int64_t heads = view.head_size, batch = slice / heads, head = slice - batch * heads;
  const uint8_t* const data = static_cast<const uint8_t*>(view.data) + batch * view.batch + head * view.head;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, words = block_m / 64;
  const int64_t first_row = int64_t{query_block} * block_m + lane % 4 * 2,
                first_col = int64_t{key_block} * kClassKeys + 16 * warp + lane / 4;
  uint32_t* const to = mask.classes.bits + int64_t{number} * bits_of_block(block_m) + warp * words * 32 + lane;
  bool any_seen = false, any_hidden = false;
#pragma unroll 1
  for (int w = 0; w < words; ++w) {
    uint32_t seen = 0, exist = 0;
    uint8_t values[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) {  // i: sixteen queries, keys eight apart, queries eight apart, neighbouring queries
      const int64_t row = first_row + 64 * w + i / 8 * 16 + i / 2 % 2 * 8 + i % 2, col = first_col + i / 4 % 2 * 8;
      // A broadcast row or column stands for all; its stride is 0. In the place of others that are not there the last
      // one is read, so that all loads are on their way at once.
      if ((view.row_size == 1 || row < view.row_size) && (view.col_size == 1 || col < view.col_size)) exist |= 1u << i;
      values[i] = __ldg(data + min(row, view.row_size - 1) * view.row + min(col, view.col_size - 1) * view.col);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) seen |= uint32_t{values[i] != 0} << i;
    seen &= exist;
    to[w * 32] = seen;
    any_seen = any_seen || seen != 0;
    any_hidden = any_hidden || seen != exist;
  }
  const uint32_t found =
      (__syncthreads_or(any_seen) != 0 ? mask::kSeen : 0) | (__syncthreads_or(any_hidden) != 0 ? mask::kHidden : 0);
  if (threadIdx.x == 0) mask.classes.data[number] = static_cast<uint8_t>(found);
}

}  // namespace flash_attn::cuda::sm90::backward
