#include "../../../common/launch.h"
#include "../../../mask/transposed_bits.h"
#include "classes.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

constexpr int kWarps = kClassKeys / 16;  // of the consumers: sixteen keys each

struct ClassesArguments {
  mask::PackedMask packed;
  TileClasses classes;
  int heads, key_blocks, query_blocks;  // sizes
  int64_t num_blocks;
  int blocks_of_cta;
  int64_t first_block;
  mask::KindCondition condition;
};

/// Sixteen keys of 64 queries as a lane's word of ScoreBits.
__device__ uint32_t transposed_word(const mask::PackedMask& packed, int64_t batch, int64_t head, int key, int query,
                                    int lane) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row_cell = min(query / mask::kCellRows + i, packed.row_cells - 1);
    const int64_t cell = packed.cell(batch, head, row_cell, min(key / mask::kCellCols, packed.col_cells - 1));
    word |= (cuda::mask::transposed_bits(packed, cell, lane) >> (key % mask::kCellCols / 2) & 0xffu) << (8 * i);
  }
  return word;
}

template <int kBlockM>
__device__ void fill_block(const ClassesArguments& arguments, int64_t number) {
  const int query_block = static_cast<int>(number % arguments.query_blocks);
  const int64_t others = number / arguments.query_blocks, slice = others / arguments.key_blocks;
  const int key_block = static_cast<int>(others % arguments.key_blocks);
  const int64_t batch = slice / arguments.heads, head = slice % arguments.heads;
  const mask::PackedMask& packed = arguments.packed;
  const uint32_t found =
      packed.tile_classes<kBlockM, kClassKeys>(batch, head, query_block * kBlockM, key_block * kClassKeys);
  if (threadIdx.x == 0) arguments.classes.data[number] = static_cast<uint8_t>(found);
  if ((found & mask::kSeen) == 0 || (found & mask::kHidden) == 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t* const to = arguments.classes.bits + number * bits_of_block(kBlockM) + warp * (kBlockM / 64) * 32 + lane;
#pragma unroll
  for (int w = 0; w < kBlockM / 64; ++w) {
    to[w * 32] =
        transposed_word(packed, batch, head, key_block * kClassKeys + 16 * warp, query_block * kBlockM + 64 * w, lane);
  }
}

/// A CTA for a few blocks, of as many warps as the consumers have.
template <int kBlockM>
__global__ void __launch_bounds__(32 * kWarps) classes_kernel(const __grid_constant__ ClassesArguments arguments) {
  if (arguments.condition.excludes()) return;
  const int64_t first = (arguments.first_block + blockIdx.x) * arguments.blocks_of_cta;
  const int64_t end = min(first + arguments.blocks_of_cta, arguments.num_blocks);
#pragma unroll 1
  for (int64_t number = first; number < end; ++number) fill_block<kBlockM>(arguments, number);
}

}  // namespace

int64_t num_tile_classes(const MaskView& mask, int block_m) {
  const TileClassSizes sizes(mask, block_m);
  return sizes.slices * sizes.query_blocks * sizes.key_blocks;
}

TileClasses place_tile_classes(const MaskView& mask, int block_m, uint8_t* data, uint32_t* bits) {
  const TileClassSizes sizes(mask, block_m);
  const int64_t slice = sizes.query_blocks * sizes.key_blocks;
  const auto stride = [](int64_t size, int64_t step) { return static_cast<int>(size == 1 ? 0 : step); };
  return {data,
          bits,
          stride(mask.batch_size, slice * mask.head_size),
          stride(mask.head_size, slice),
          stride(mask.col_size, sizes.query_blocks),
          stride(mask.row_size, 1)};
}

void fill_tile_classes(const MaskView& mask, const mask::PackedMask& packed, int block_m, const TileClasses& classes,
                       const mask::KindCondition& condition, cudaStream_t stream) {
  // Of many blocks most are skipped, or all, which takes as long as starting CTAs for them.
  constexpr int64_t kManyBlocks = 4096;
  const TileClassSizes sizes(mask, block_m);
  const int64_t num_blocks = num_tile_classes(mask, block_m), of_cta = clamp<int64_t>(num_blocks / kManyBlocks, 1, 8);
  const ClassesArguments arguments{packed,
                                   classes,
                                   static_cast<int>(mask.head_size),
                                   static_cast<int>(sizes.key_blocks),
                                   static_cast<int>(sizes.query_blocks),
                                   num_blocks,
                                   static_cast<int>(of_cta),
                                   0,
                                   condition};
  launch_blocks(block_m == 64 ? classes_kernel<64> : classes_kernel<128>, arguments, ceil_div(num_blocks, of_cta),
                32 * kWarps, 0, stream, "sm90 classes of tiles");
}

}  // namespace flash_attn::cuda::sm90::backward
