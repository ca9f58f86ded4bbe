// The products of one block of keys: S = Q K^T, P, O += P V, for a warp's rows and its share of the keys.
#pragma once

#include "float8.h"
#include "softmax.h"

namespace flash_attn::cuda::decode {

template <typename C>
FLASH_ATTN_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  sm80::mma_m16n8k16<typename C::Operand>(c, a, b0, b1);
}

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
    // A lane's columns: pairs 8 apart, or with float8 four that follow each other (float8.h).
    constexpr int kLaneColumns = C::kFloat8 ? 4 : 2, kPairStep = C::kFloat8 ? 2 : 8;
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
      from[r] = reinterpret_cast<const uint32_t*>(line + kLaneColumns * (threadIdx.x % 4));
      rows.slope[r] = 0.f;
      if (p.alibi_slopes != nullptr && read[r]) {
        const int64_t slope = t.b * p.alibi_batch_stride + head * p.alibi_head_stride;
        rows.slope[r] = sm80::kLog2E * static_cast<const float*>(p.alibi_slopes)[slope];
      }
    }
    const auto fragment = [&](int k, uint32_t (&a)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i % 2, first = 16 * k + kPairStep * (i / 2);
        a[i] = read[r] && first < p.head_dim ? from[r][first / 2] : 0u;
      }
    };
    [[maybe_unused]] HalfScale<Element> scale;
    if constexpr (C::kFloat8) {
#pragma unroll 4
      for (int k = 0; k < kSteps; ++k) {
        uint32_t a[4];
        fragment(k, a);
        scale.add(a);
      }
      scale.finish();
      const float descale = params.k_descale.at(t.b, t.head_k);
#pragma unroll
      for (int r = 0; r < 2; ++r) rows.unit[r] = scale.unit(r) * descale;
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      fragment(k, a);
      if constexpr (C::kFloat8) scale.apply(a);
      if constexpr (C::kQueriesInShared) {
        store_shared(queries + k * 512, a);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) q[k][i] = a[i];
      }
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
#pragma unroll 1
    for (int key = place.first_key; key < place.first_key + C::kWarpKeys; key += C::kStepKeys) {
      process_keys(params, t, stage, key, first_key + key, partial, place);
    }
  }

 private:
  /// kStepKeys of them, from `key` of the stage on, which is key `number` of the sequence.
  FLASH_ATTN_DEVICE void process_keys(const DecodeParams& params, const TileInfo& t, uint32_t stage, int key,
                                      int number, bool partial, const WarpPlace<C>& place) {
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
            mma<C>(first, a[i], half_low(b[i]), half_high(b[i]));
            mma<C>(second, a[i], half_low(b[2 + i]), half_high(b[2 + i]));
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
    if (softmax.update(s, factor)) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][i] *= factor[i / 2];
      }
    }
    const uint32_t values = stage + C::kTileBytes + Tile::offset(key + lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < C::kStepKeys / 16; ++n) {
      const uint32_t a[4] = {sm80::pack<typename C::Operand>(s[2 * n][0], s[2 * n][1]),
                             sm80::pack<typename C::Operand>(s[2 * n][2], s[2 * n][3]),
                             sm80::pack<typename C::Operand>(s[2 * n + 1][0], s[2 * n + 1][1]),
                             sm80::pack<typename C::Operand>(s[2 * n + 1][2], s[2 * n + 1][3])};
      constexpr int kLoads = C::kColumns / 16 / kStepsOfChunks;
#pragma unroll
      for (int c = 0; c < kLoads; ++c) {
        uint32_t b[4];
        const int step = C::kParts == 1 ? c : place.part * kLoads + c;
        sm80::ldmatrix_x4_trans(b, Tile::along(values + 16 * n * Tile::kRowBytes, step));
        if constexpr (C::kFloat8) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t keys_low = even_then_odd(b[2 * i]), keys_high = even_then_odd(b[2 * i + 1]);
            mma<C>(o[4 * c + 2 * i], a, half_low(keys_low), half_low(keys_high));
            mma<C>(o[4 * c + 2 * i + 1], a, half_high(keys_low), half_high(keys_high));
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
