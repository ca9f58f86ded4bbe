// The products of one block of keys: S = Q K^T, P, O += P V, for a warp's rows and its share of the keys.
#pragma once

#include "../ends/finish.h"
#include "../ends/lane_rows.h"
#include "../kernel.h"
#include "../rows/queries.h"
#include "../rows/softmax.h"
#include "float8.h"
#include "merge.h"

namespace flash_attn::cuda::decode {

template <typename C>
FLASH_ATTN_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  sm80::mma_m16n8k16<typename C::Operand>(c, a, b0, b1);
}

template <typename C>
struct WarpState {
  using Config = C;
  static constexpr int kSteps = C::kHeadDim / 16, kTiles = C::kColumns / 8;
  const WarpPlace<C> place;
  uint32_t q[C::kQueriesInShared ? 1 : kSteps][4];  // A fragments
  uint32_t queries;                                 // or where this lane's are in shared memory, a row of lanes a step
  float o[kTiles][4];
  Softmax<C> softmax;
  LaneRows rows;

  /// `memory` has kQueryBytes.
  FLASH_ATTN_DEVICE explicit WarpState(const unsigned char* memory)
      : queries(sm80::shared_address(memory) + (place.m * kSteps * 32 + threadIdx.x % 32) * 16) {}

  FLASH_ATTN_DEVICE void get_queries(int step, uint32_t (&a)[4]) const {
    if constexpr (C::kQueriesInShared) {
      load_shared(queries + step * 512, a);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = q[step][i];
    }
  }

  /// At the start of a tile: nothing summed up yet, and the rows' queries, straight from memory. Those in shared memory
  /// are seen after the next barrier; of the warps of a row one writes them.
  FLASH_ATTN_DEVICE void start(const DecodeParams& params, const TileInfo& t) {
    const LaneQueries<C> from(params, t, place.first_row, rows);
    [[maybe_unused]] HalfScale<typename C::Element> scale;
    if constexpr (C::kFloat8) {
#pragma unroll 4
      for (int k = 0; k < kSteps; ++k) {
        uint32_t a[4];
        from.fragment(k, a);
        scale.add(a);
      }
      scale.finish();
      const float descale = params.k_descale.at(t.b, t.head_k);
#pragma unroll
      for (int r = 0; r < 2; ++r) rows.unit[r] = scale.unit(r) * descale;
    }
    const bool stores = !C::kQueriesInShared || (place.n == 0 && place.part == 0);
#pragma unroll
    for (int k = 0; stores && k < kSteps; ++k) {
      uint32_t a[4];
      from.fragment(k, a);
      if constexpr (C::kFloat8) scale.apply(a);
      if constexpr (C::kQueriesInShared) {
        store_shared(queries + k * 512, a);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) q[k][i] = a[i];
      }
    }
    softmax.reset();
    clear(o);
  }

  /// `stage` holds the block's keys and values; the warp's keys begin at place.first_key of it.
  FLASH_ATTN_DEVICE void process(const DecodeParams& params, const TileInfo& t, const unsigned char* stage,
                                 int first_key, bool partial) {
#pragma unroll 1
    for (int key = place.first_key; key < place.first_key + C::kWarpKeys; key += C::kStepKeys) {
      process_keys(params, t, shared_address(stage), key, first_key + key, partial);
    }
  }

  /// The tile's end, in the stage that was used last.
  FLASH_ATTN_DEVICE void finish(const DecodeParams& params, const TileInfo& t, const Share& share, int* word,
                                const FreeStages& free, float2* statistics) const {
    finish_tile<C>(params, t, share, word, free, [&](const RowSums& part) {
      if constexpr (C::kWarpsN == 1) {
        store_lane_rows<C>(params, t, place.first_row, place.part * C::kColumns, o, softmax, part);
        if constexpr (C::kQueriesInShared) consumers_sync<C>();  // queries are read
      } else {
        const Merge<C> merge{reinterpret_cast<float*>(free.stages), statistics};
        merge_warps(t, o, softmax, place, merge,
                    [&](int row, int row_place) { store_row(params, t, merge, row, row_place, part); });
      }
    });
  }

 private:
  /// kStepKeys of them, from `key` of the stage on, which is key `number` of the sequence.
  FLASH_ATTN_DEVICE void process_keys(const DecodeParams& params, const TileInfo& t, uint32_t stage, int key,
                                      int number, bool partial) {
    using Tile = typename C::Tile;
    constexpr int kKeyTiles = C::kStepKeys / 8;
    const int lane = threadIdx.x % 32;
    // Of few fragments two sums each, so that products wait for each other half as long.
    constexpr int kSums = C::kStepKeys == 16 ? 2 : 1;
    float sums[kSums][kKeyTiles][4] = {};
    float (&s)[kKeyTiles][4] = sums[0];
    const uint32_t keys = stage + Tile::offset(key + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    constexpr int kStepsOfChunks = C::kFloat8 ? 2 : 1;  // of 16 columns, in the two chunks that a lane loads at once
#pragma unroll
    for (int k = 0; k < kSteps; k += kStepsOfChunks) {
      uint32_t a[kStepsOfChunks][4];
#pragma unroll
      for (int i = 0; i < kStepsOfChunks; ++i) get_queries(k + i, a[i]);
#pragma unroll
      for (int n = 0; n < C::kStepKeys / 16; ++n) {
        float (&first)[4] = sums[k / kStepsOfChunks % kSums][2 * n];
        float (&second)[4] = sums[k / kStepsOfChunks % kSums][2 * n + 1];
        uint32_t b[4];
        sm80::ldmatrix_x4(b, Tile::along(keys + 16 * n * Tile::kRowBytes, k / kStepsOfChunks));
        if constexpr (C::kFloat8) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint2 one = halves(b[i]), other = halves(b[2 + i]);
            mma<C>(first, a[i], one.x, one.y);
            mma<C>(second, a[i], other.x, other.y);
          }
        } else {
          mma<C>(first, a[0], b[0], b[1]);
          mma<C>(second, a[0], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int i = 0; kSums > 1 && i < 4 * kKeyTiles; ++i) s[i / 4][i % 4] += sums[kSums - 1][i / 4][i % 4];
    Softmax<C>::template score<C::kFloat8>(params, t, rows, number + 2 * (lane % 4), partial, s);
    float factor[2];
    if (softmax.update(s, factor)) rescale(o, factor);
    const uint32_t values = stage + C::kTileBytes + Tile::offset(key + lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < C::kStepKeys / 16; ++n) {
      uint32_t a[4];
      pack_probabilities<typename C::Operand>(s[2 * n], s[2 * n + 1], a);
      constexpr int kLoads = C::kColumns / 16 / kStepsOfChunks;
#pragma unroll
      for (int c = 0; c < kLoads; ++c) {
        uint32_t b[4];
        const int step = C::kParts == 1 ? c : place.part * kLoads + c;
        sm80::ldmatrix_x4_trans(b, Tile::along(values + 16 * n * Tile::kRowBytes, step));
        if constexpr (C::kFloat8) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint2 low = halves(even_then_odd(b[2 * i])), high = halves(even_then_odd(b[2 * i + 1]));
            mma<C>(o[4 * c + 2 * i], a, low.x, high.x);
            mma<C>(o[4 * c + 2 * i + 1], a, low.y, high.y);
          }
        } else {
          mma<C>(o[2 * c], a, b[0], b[1]);
          mma<C>(o[2 * c + 1], a, b[2], b[3]);
        }
      }
    }
  }
};

}  // namespace flash_attn::cuda::decode
