// A packed attn_mask by tiles and query blocks (TileClasses of params.h), so that a warp with few registers finds what
// to visit, and the copy engine brings bits in the order in which consumers use them.
#pragma once

#include <cuda_runtime_api.h>

#include "../../../../mask_kind.h"
#include "../../../../sequence.h"
#include "params.h"

namespace flash_attn::cuda::sm90::backward {

constexpr int kClassKeys = 128;  // kBlockN of every kernel of extended/

/// block_m: kBlockM of the kernel, 64 or 128.
int64_t num_tile_classes(const MaskView& mask, int block_m);
/// Words of TileClasses::bits for each of them.
FLASH_ATTN_HOST_DEVICE constexpr int bits_of_block(int block_m) { return block_m / 64 * kClassKeys / 16 * 32; }
/// How many there are: blocks of query rows and of keys in a slice of the mask, a batch entry's head.
struct TileClassSizes {
  int64_t query_blocks, key_blocks, slices;
  TileClassSizes(const MaskView& mask, int block_m)
      : query_blocks(ceil_div(mask.row_size, block_m)),
        key_blocks(ceil_div(mask.col_size, kClassKeys)),
        slices(mask.batch_size * mask.head_size) {}
};
TileClasses place_tile_classes(const MaskView& mask, int block_m, uint8_t* data, uint32_t* bits);
void fill_tile_classes(const MaskView& mask, const mask::PackedMask& packed, int block_m, const TileClasses& classes,
                       const mask::KindCondition& condition, cudaStream_t stream);

}  // namespace flash_attn::cuda::sm90::backward
