// What the products of a warpgroup read, made of what a thread has: fragments of a tile's rows are those of mma.sync.
#pragma once

#include "../rows/softmax.h"
#include "config.h"

namespace flash_attn::cuda::decode {

/// Accumulators of 8 columns each, as products see them.
template <int kTiles>
FLASH_ATTN_DEVICE float (&accumulators(float (&x)[kTiles][4]))[4 * kTiles] {
  return reinterpret_cast<float (&)[4 * kTiles]>(x);
}

/// Descriptor of a tile of `rows` rows of which a product reads k along the rows. As CTAs may be clusters, the rank is
/// taken off the address: of this descriptor it would change the stride between panels.
FLASH_ATTN_DEVICE uint32_t descriptor_across(const void* tile, int rows) {
  return sm90::cluster_descriptor(tile) | uint32_t(rows * 8) << 16;
}

/// What this thread, or one that it has waited for, has written to shared memory is seen by products that it asks for
/// from here on, which read by another way.
FLASH_ATTN_DEVICE void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// A warp's row of a tile of 64, the first of this lane's two.
FLASH_ATTN_DEVICE int first_row_of_lane() {
  uint32_t thread = threadIdx.x;
  forget_derived(thread);  // else it stands in a register while blocks are processed
  return int(thread) % 128 / 32 * 16 + int(thread) % 32 / 4;
}

/// A tile's queries into panels of shared memory, which the products read after a barrier of all that copy: chunks
/// [begin, end) of 8 columns, by a warpgroup. All of them are under way together.
template <typename C>
FLASH_ATTN_DEVICE void copy_queries(const DecodeParams& params, const TileInfo& t, unsigned char* memory, int begin,
                                    int end) {
  using Queries = PanelTile<C::kBlockM, C::kHeadDim>;
  const uint32_t to = shared_address(memory), thread = threadIdx.x % 128;
#pragma unroll 1
  for (int row = int(thread) / 8; row < C::kBlockM; row += 16) {
    const QueryRow<C> from(params, t, row);
#pragma unroll 1
    for (int chunk = begin + int(thread) % 8; chunk < end; chunk += 8) {
      const bool read = from.exists && 8 * chunk < params.problem.head_dim;
      const void* const source = read ? from.columns + 8 * chunk : params.problem.q.data;
      sm80::cp_async_16_or_zeros(to + Queries::offset(row, chunk), source, read);
    }
  }
  sm80::cp_async_commit();
  sm80::cp_async_wait<0>();
  fence_for_products();
}

/// Probabilities of 16 keys a k-step, rounded.
template <typename Element, int kTiles>
FLASH_ATTN_DEVICE void pack_probabilities(const float (&s)[kTiles][4], uint32_t (&p)[kTiles / 2][4]) {
#pragma unroll
  for (int n = 0; n < kTiles / 2; ++n) pack_probabilities<Element>(s[2 * n], s[2 * n + 1], p[n]);
}

}  // namespace flash_attn::cuda::decode
