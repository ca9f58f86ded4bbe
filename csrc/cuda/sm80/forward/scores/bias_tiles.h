// ForwardBlock: an additive attn_mask by way of shared memory, in kernels of Rules::kBias. Each warp copies and reads
// those of its own scores. What it has read of a tile makes room for the next one's, which comes while P V and the next
// S are computed; or for P, and the next one's comes while S is computed.
#pragma once

#include "../../copy_part.h"
#include "../block.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::load_bias(int block) const {
  if (block < block_begin()) return;
  static_assert(BiasTile::kWholeLines);
  constexpr int kChunks = kSubN / 8, kStep = 32 / kChunks;  // of a row; rows between two of this thread's pieces
  const uint32_t thread = fresh_thread(block);
  const uint32_t chunk = uint32_t(warp_key()) / 8 + thread % kChunks, first = warp_row() + thread % 32 / kChunks;
  const uint32_t to = q_tile() + Config::kBiases + BiasTile::offset(first, chunk);
  const char* from =
      tile.mask + 2 * uint64_t{uint32_t(block * kBlockN + 8 * chunk)} + uint64_t{first} * params.mask_row;
  const int64_t step = kStep * params.mask_row;
  const int rows = int(tile.sequence.seqlen_q) - tile.m_begin, columns = int(tile.sequence.seqlen_k) - block * kBlockN;
  __syncwarp();  // all have read the last ones
  // A piece's place in its row changes with the row's number in eight.
  const auto place = [&](int i) { return (to ^ (i * kStep % 8 * 16)) + i * kStep * BiasTile::kRowBytes; };
  if (rows >= kBlockM && columns >= kBlockN) {
#pragma unroll
    for (int i = 0; i < Config::kWarpRows / kStep; ++i, from += step) cp_async_16(place(i), from);
  } else {
    const int bytes = 2 * min(max(columns - 8 * int(chunk), 0), 8);
#pragma unroll 1
    for (int i = 0; i < Config::kWarpRows / kStep; ++i, from += step) {
      const bool exists = int(first) + i * kStep < rows && bytes > 0;
      cp_async_part(place(i), exists ? from : static_cast<const char*>(p.mask.data), exists ? bytes : 0);
    }
  }
}

template <typename Config>
SM80_DEVICE bool ForwardBlock<Config>::add_bias() {
  cp_async_wait<1>();  // the group after theirs is of V or of the next K
  __syncwarp();        // the warp's biases are there
  const float scale = float(p.softmax_scale);
  const uint32_t biases = address_by_rows<BiasTile>(q_tile() + Config::kBiases, warp_row(), lane);
  /// visit(score, bias) of all; returns the least of pairs.
  const auto visit_biases = [&](const auto& visit) {
    uint32_t least = 0;
#pragma unroll
    for (int n = 0; n < kNTiles; n += 2) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        uint32_t x[4];
        ldmatrix_x4(x, BiasTile::along(biases, warp_key() / 16 + n / 2) + m * 16 * BiasTile::kRowBytes);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          visit(s[m][n + i / 4][i % 4], i % 2 == 0 ? low_half(x[i / 2], Element()) : high_half(x[i / 2], Element()));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) least = least_halves(least, x[i], Element());
      }
    }
    return least;
  };
  const uint32_t least = visit_biases([scale](float& score, float bias) { score = fmaf(score, scale, bias); });
  if (!__any_sync(~0u, has_lowest(least, Element()))) return false;
  // A hidden score becomes -inf whatever it was, for a NaN that is masked out must go.
  visit_biases([](float& score, float bias) {
    if (bias == -INFINITY) score = bias;
  });
  return true;
}

}  // namespace flash_attn::cuda::sm80
