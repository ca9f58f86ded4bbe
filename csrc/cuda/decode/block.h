// The products of one block of keys: S = Q K^T, P, O += P V, for a warp's rows and its share of the keys.
#pragma once

#include "softmax.h"

namespace flash_attn::cuda::decode {

template <typename C>
struct WarpState {
  static constexpr int kSteps = C::kHeadDim / 16, kTiles = C::kColumns / 8;
  uint32_t q[C::kQueriesInShared ? 1 : kSteps][4];  // A fragments
  uint32_t queries;                                 // or where this lane's are in shared memory, a row of lanes a step
  float o[kTiles][4];
  Softmax<C> softmax;
  LaneRows rows;

  /// `memory` has kQueryBytes.
  FLASH_ATTN_DEVICE WarpState(const unsigned char* memory, const WarpPlace<C>& place)
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
  /// are seen after the next barrier; all warps of a row write the same.
  FLASH_ATTN_DEVICE void start(const DecodeParams& params, const TileInfo& t, const WarpPlace<C>& place) {
    using Element = typename C::Element;
    const ForwardParams& p = params.problem;
    const uint32_t* from[2];
    bool read[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = place.first_row + 8 * r;
      int in_group;
      rows.query[r] = params.group.divide(t.first_row + row, in_group);
      const int head = t.head_k * int(params.group.value) + in_group;
      read[r] = row < t.rows && rows.query[r] < t.seqlen_q;
      const int64_t at = read[r] ? t.b * p.q.batch + (t.q_row + rows.query[r]) * p.q.row + head * p.q.head : 0;
      const Element* const line = static_cast<const Element*>(p.q.data) + at;
      from[r] = reinterpret_cast<const uint32_t*>(line + 2 * (threadIdx.x % 4));
      rows.slope[r] = 0.f;
      if (p.alibi_slopes != nullptr && read[r]) {
        const int64_t slope = t.b * p.alibi_batch_stride + head * p.alibi_head_stride;
        rows.slope[r] = sm80::kLog2E * static_cast<const float*>(p.alibi_slopes)[slope];
      }
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i % 2, first = 16 * k + 8 * (i / 2);
        a[i] = read[r] && first < p.head_dim ? from[r][first / 2] : 0u;
        if constexpr (!C::kQueriesInShared) q[k][i] = a[i];
      }
      if constexpr (C::kQueriesInShared) store_shared(queries + k * 512, a);
    }
    softmax.reset();
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n][i] = 0.f;
    }
  }

  /// `stage` holds the block's keys and values; the warp's keys begin at place.first_key of it.
  FLASH_ATTN_DEVICE void process(const DecodeParams& params, const TileInfo& t, uint32_t stage, int first_key,
                                 bool partial, const WarpPlace<C>& place) {
    using Tile = typename C::Tile;
    constexpr int kKeyTiles = C::kWarpKeys / 8;
    const int lane = threadIdx.x % 32;
    // Of few fragments two sums each, so that products wait for each other half as long.
    constexpr int kSums = C::kWarpKeys == 16 ? 2 : 1;
    float sums[kSums][kKeyTiles][4] = {};
    float (&s)[kKeyTiles][4] = sums[0];
    const uint32_t keys = stage + Tile::offset(place.first_key + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      get_queries(k, a);
#pragma unroll
      for (int n = 0; n < C::kWarpKeys / 16; ++n) {
        uint32_t b[4];
        sm80::ldmatrix_x4(b, Tile::along(keys + 16 * n * Tile::kRowBytes, k));
        sm80::mma_m16n8k16<typename C::Element>(sums[k % kSums][2 * n], a, b[0], b[1]);
        sm80::mma_m16n8k16<typename C::Element>(sums[k % kSums][2 * n + 1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int i = 0; kSums > 1 && i < 4 * kKeyTiles; ++i) s[i / 4][i % 4] += sums[kSums - 1][i / 4][i % 4];
    Softmax<C>::score(params, t, rows, first_key + place.first_key + 2 * (lane % 4), partial, s);
    float factor[2];
    if (softmax.update(s, factor)) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][i] *= factor[i / 2];
      }
    }
    const uint32_t values = stage + C::kTileBytes + Tile::offset(place.first_key + lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < C::kWarpKeys / 16; ++n) {
      const uint32_t a[4] = {sm80::pack<typename C::Element>(s[2 * n][0], s[2 * n][1]),
                             sm80::pack<typename C::Element>(s[2 * n][2], s[2 * n][3]),
                             sm80::pack<typename C::Element>(s[2 * n + 1][0], s[2 * n + 1][1]),
                             sm80::pack<typename C::Element>(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
      for (int c = 0; c < C::kColumns / 16; ++c) {
        uint32_t b[4];
        const int step = C::kParts == 1 ? c : place.part * (C::kColumns / 16) + c;
        sm80::ldmatrix_x4_trans(b, Tile::along(values + 16 * n * Tile::kRowBytes, step));
        sm80::mma_m16n8k16<typename C::Element>(o[2 * c], a, b[0], b[1]);
        sm80::mma_m16n8k16<typename C::Element>(o[2 * c + 1], a, b[2], b[3]);
      }
    }
  }
};

}  // namespace flash_attn::cuda::decode
