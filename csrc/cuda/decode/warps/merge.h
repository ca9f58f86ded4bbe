// What the warps of a CTA have of a tile comes together, in a stage of shared memory that is free.
#pragma once

#include "../ends/output.h"
#include "../stages/stages.h"
#include "config.h"

namespace flash_attn::cuda::decode {

template <typename C>
struct Merge {
  float* sum;          // (kWarpsN, kPassRows, kPitch): O of some rows, by each warp
  float2* statistics;  // (kWarpsN, kBlockM): row_max and row_sum

  /// What all warps together have of a row.
  struct Row {
    float high, sum;           // the maximum, in log2, and the sum relative to it
    float weight[C::kWarpsN];  // of each warp's O; 0: it has seen nothing of the row, and its O may be NaN there
  };

  FLASH_ATTN_DEVICE Row row(int row) const {
    Row r;
    float2 part[C::kWarpsN];
    r.high = -INFINITY, r.sum = 0.f;
#pragma unroll
    for (int w = 0; w < C::kWarpsN; ++w) {
      part[w] = statistics[w * C::kBlockM + row];
      r.high = fmaxf(r.high, part[w].x);
    }
#pragma unroll
    for (int w = 0; w < C::kWarpsN; ++w) {
      r.weight[w] = part[w].y == 0.f ? 0.f : sm80::fast_exp2(part[w].x - r.high);
      r.sum += r.weight[w] * part[w].y;
    }
    return r;
  }

  /// Four columns of O; the row is number `place` of its pass.
  FLASH_ATTN_DEVICE float4 columns(const Row& row, int place, int column) const {
    float4 o = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int w = 0; w < C::kWarpsN; ++w) {
      if (row.weight[w] == 0.f) continue;
      const float4 x = *reinterpret_cast<const float4*>(sum + (w * C::kPassRows + place) * C::kPitch + column);
      const float weight = row.weight[w];
      o.x += weight * x.x, o.y += weight * x.y, o.z += weight * x.z, o.w += weight * x.w;
    }
    return o;
  }
};

/// Calls finish(row, place) of each row of the tile, by a warp, with what the warps have of it in `merge`. All
/// consumers call it, when none reads the stage any more but others of the same kind.
template <typename C, int kTiles, typename Finish>
FLASH_ATTN_DEVICE void merge_warps(const TileInfo& t, const float (&o)[kTiles][4], const Softmax<C>& softmax,
                                   const WarpPlace<C>& place, const Merge<C>& merge, const Finish& finish) {
  uint32_t thread = threadIdx.x;
  forget_derived(thread);  // else what follows from it stands in registers while blocks are processed
  const int lane = int(thread) % 32, warp = int(thread) / 32;
  consumers_sync<C>();  // the stage is free
#pragma unroll
  for (int i = 0; i < C::kPasses; ++i) {
    const float sum = sm80::quad_sum(softmax.row_sum[i]);
    if (lane % 4 == 0 && place.part == 0)
      merge.statistics[place.n * C::kBlockM + place.first_row + 8 * i] = {softmax.row_max[i], sum};
  }
  float* const to =
      merge.sum + (place.n * C::kPassRows + 8 * place.m + lane / 4) * C::kPitch + place.part * C::kColumns;
#pragma unroll 1
  for (int pass = 0; pass < C::kPasses && 8 * pass < t.rows; ++pass) {
    if (pass > 0) consumers_sync<C>();  // the pass before is read
    const auto pair = [&](const float (&x)[4], int i) { return pass == 0 ? x[i] : x[2 + i]; };
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      const float (&a)[4] = o[n], (&b)[4] = o[n + 1];
      if constexpr (C::kFloat8) {  // even columns, and odd ones
        *reinterpret_cast<float4*>(to + 8 * n + lane % 4 * 4) = {pair(a, 0), pair(b, 0), pair(a, 1), pair(b, 1)};
      } else {
        *reinterpret_cast<float2*>(to + 8 * n + lane % 4 * 2) = {pair(a, 0), pair(a, 1)};
        *reinterpret_cast<float2*>(to + 8 * (n + 1) + lane % 4 * 2) = {pair(b, 0), pair(b, 1)};
      }
    }
    consumers_sync<C>();  // everything is there
#pragma unroll 1
    for (int i = warp; i < C::kPassRows; i += C::kConsumers / 32) {
      const int row = i / 8 * 16 + 8 * pass + i % 8;
      if (row < t.rows) finish(row, i);
    }
  }
}

/// A row of out, or where others have parts of the tile too (`part` is not null), of this CTA's part. By a warp, a lane
/// four columns.
template <typename C>
FLASH_ATTN_DEVICE void store_row(const DecodeParams& params, const TileInfo& t, const Merge<C>& merge, int row,
                                 int place, const RowSums& part) {
  using Element = typename C::Element;
  const ForwardParams& p = params.problem;
  const int lane = threadIdx.x % 32;
  const typename Merge<C>::Row statistics = merge.row(row);
  Element* to = nullptr;
  float factor = 0.f;
  if (part.out == nullptr) {
    const OutputRow<C> output(params, t, row);
    factor = output.finish(params, t, {statistics.high, statistics.sum}, lane == 0);
    to = output.out(p, t);
  } else if (lane == 0) {
    part.statistics[row] = {statistics.high, statistics.sum};
  }
#pragma unroll 1
  for (int column = 4 * lane; column < p.head_dim_v; column += 128) {
    const float4 o = merge.columns(statistics, place, column);
    if (part.out == nullptr) {
      store_out<C>(to + column, o, factor);
    } else {
      *reinterpret_cast<float4*>(part.out + row * C::kHeadDimV + column) = o;
    }
  }
}

}  // namespace flash_attn::cuda::decode
