// The products of one block of keys by a warpgroup: S = Q K^T, P, O += P V. Keys and values are read from shared memory
// once for all 64 rows, where mma.sync reads them once for each 16.
#pragma once

#include "../ends/finish.h"
#include "../ends/lane_rows.h"
#include "../kernel.h"
#include "operands.h"

namespace flash_attn::cuda::decode {

template <typename C>
struct WarpgroupState {
  using Config = C;
  using Products = sm90::Wgmma<typename C::Element>;
  static constexpr int kSteps = C::kHeadDim / 16, kTiles = C::kHeadDim / 8;

  uint32_t q[C::kQueriesInShared ? 1 : kSteps][4];
  unsigned char* const queries;  // or panels in shared memory
  float o[kTiles][4];
  Softmax<C> softmax;
  LaneRows rows;

  /// `memory` has kQueryBytes.
  FLASH_ATTN_DEVICE explicit WarpgroupState(unsigned char* memory) : queries(memory) {}

  /// At the start of a tile: nothing summed up yet, and the rows' queries.
  FLASH_ATTN_DEVICE void start(const DecodeParams& params, const TileInfo& t) {
    const LaneQueries<C> from(params, t, first_row_of_lane(), rows);
    if constexpr (C::kQueriesInShared) {
      copy_queries<C>(params, t, queries, 0, C::kHeadDim / 8);
    } else {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) from.fragment(k, q[k]);
    }
    softmax.reset();
    clear(o);
  }

  /// `stage` holds the block's keys and values, which begin with key `number` of the sequence.
  FLASH_ATTN_DEVICE void process(const DecodeParams& params, const TileInfo& t, unsigned char* stage, int number,
                                 bool partial) {
    fence_for_products();  // the loading warps' copies
    float s[C::kBlockN / 8][4];
    const uint32_t keys = sm90::cluster_descriptor(stage);
    sm90::wgmma_discard(accumulators(s));
    sm90::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const uint32_t b = keys + sm90::k_step_along(k, C::kBlockN);
      if constexpr (C::kQueriesInShared) {
        const uint32_t a = sm90::cluster_descriptor(queries) + sm90::k_step_along(k, C::kBlockM);
        if (k == 0) Products::template ss<false>(accumulators(s), a, b);
        if (k != 0) Products::template ss<true>(accumulators(s), a, b);
      } else {
        if (k == 0) Products::template rs<false, sm90::kColumns>(accumulators(s), q[k], b);
        if (k != 0) Products::template rs<true, sm90::kColumns>(accumulators(s), q[k], b);
      }
    }
    sm90::wgmma_commit();
    sm90::wgmma_wait<0>();
    sm90::wgmma_results(accumulators(s));
    Softmax<C>::template score<false>(params, t, rows, number + 2 * (threadIdx.x % 4), partial, s);
    float factor[2];
    if (softmax.update(s, factor)) rescale(o, factor);
    uint32_t p[C::kBlockN / 16][4];
    pack_probabilities<typename C::Element>(s, p);
    const uint32_t values = descriptor_across(stage + C::kTileBytes, C::kBlockN);
    sm90::wgmma_fence();
#pragma unroll
    for (int k = 0; k < C::kBlockN / 16; ++k) {
      Products::template rs<true>(accumulators(o), p[k], values + sm90::k_step_across(k));
    }
    sm90::wgmma_commit();
    sm90::wgmma_wait<0>();
    sm90::wgmma_results(accumulators(o));
  }

  /// The tile's end.
  FLASH_ATTN_DEVICE void finish(const DecodeParams& params, const TileInfo& t, const Share& share, int* word,
                                const FreeStages& free, float2*) const {
    finish_tile<C>(params, t, share, word, free, [&](const RowSums& part) {
      store_lane_rows<C>(params, t, first_row_of_lane(), 0, o, softmax, part);
      if constexpr (C::kQueriesInShared) consumers_sync<C>();  // queries are read
    });
  }
};

}  // namespace flash_attn::cuda::decode
