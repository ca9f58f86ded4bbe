// What the products of a warpgroup read, made of what a thread has: fragments of a tile's rows are those of mma.sync.
#pragma once

#include "../rows/queries.h"
#include "config.h"

namespace flash_attn::cuda::decode {

/// Accumulators of 8 columns each, as products see them.
template <int kTiles>
FLASH_ATTN_DEVICE float (&accumulators(float (&x)[kTiles][4]))[4 * kTiles] {
  return reinterpret_cast<float (&)[4 * kTiles]>(x);
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

/// A tile's queries into panels of shared memory, which the products read after a barrier of all that write: k-steps
/// [begin, end) of 16 columns.
template <typename C>
FLASH_ATTN_DEVICE void store_queries(const LaneQueries<C>& from, unsigned char* memory, int begin, int end) {
  using Queries = PanelTile<C::kBlockM, C::kHeadDim>;
  const int row = first_row_of_lane();
  const uint32_t to = shared_address(memory) + 4 * (threadIdx.x % 4);
#pragma unroll 4
  for (int k = begin; k < end; ++k) {
    uint32_t a[4];
    from.fragment(k, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + Queries::offset(row + i % 2 * 8, 2 * k + i / 2)), "r"(a[i])
                   : "memory");
    }
  }
  fence_for_products();
}

/// Probabilities of 16 keys a k-step, rounded.
template <typename Element, int kTiles>
FLASH_ATTN_DEVICE void pack_probabilities(const float (&s)[kTiles][4], uint32_t (&p)[kTiles / 2][4]) {
#pragma unroll
  for (int n = 0; n < kTiles / 2; ++n) {
    p[n][0] = pack<Element>(s[2 * n][0], s[2 * n][1]);
    p[n][1] = pack<Element>(s[2 * n][2], s[2 * n][3]);
    p[n][2] = pack<Element>(s[2 * n + 1][0], s[2 * n + 1][1]);
    p[n][3] = pack<Element>(s[2 * n + 1][2], s[2 * n + 1][3]);
  }
}

}  // namespace flash_attn::cuda::decode
