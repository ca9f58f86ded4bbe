// The end of a tile: the warps' sums become rows of out and lse, or a part of a tile.
#pragma once

#include "merge.h"
#include "sharing/parts.h"

namespace flash_attn::cuda::decode {

/// Where a packed row of a tile is written.
template <typename C>
struct OutputRow {
  int query, head;
  bool used;  // not one that only gets zeros

  FLASH_ATTN_DEVICE OutputRow(const DecodeParams& params, const TileInfo& t, int row) {
    int in_group;
    query = params.group.divide(t.first_row + row, in_group);
    head = t.head_k * int(params.group.value) + in_group;
    used = query < t.seqlen_q;
  }
  FLASH_ATTN_DEVICE typename C::Element* out(const ForwardParams& p, const TileInfo& t) const {
    return static_cast<typename C::Element*>(p.out.data) + int64_t{t.b} * p.out.batch +
           int64_t{t.q_row + query} * p.out.row + int64_t{head} * p.out.head;
  }
  FLASH_ATTN_DEVICE float& lse(const ForwardParams& p, const TileInfo& t) const {
    return static_cast<float*>(
        p.lse.data)[t.b * p.lse.batch + head * p.lse.head + int64_t{t.q_row + query} * p.lse.row];
  }
  /// What O, relative to the maximum, is to be multiplied by; also writes lse, by one of the row's threads.
  FLASH_ATTN_DEVICE float finish(const DecodeParams& params, const TileInfo& t, float2 statistics, bool writes) const {
    const ForwardParams& p = params.problem;
    float high = statistics.x * sm80::kLn2, sum = statistics.y, correction = 1.f;
    if (p.sinks != nullptr) {
      const float sink = static_cast<const float*>(p.sinks)[head];
      const float top = fmaxf(high, sink);
      if (top > -INFINITY) {
        correction = sm80::fast_exp2((high - top) * sm80::kLog2E);
        sum = sum * correction + sm80::fast_exp2((sink - top) * sm80::kLog2E);
        high = top;
      }
    }
    const bool empty = !used || sum == 0.f;
    if (writes) lse(p, t) = empty ? -INFINITY : high + logf(sum);
    return empty ? 0.f : correction / sum * (C::kFloat8 ? params.v_descale.at(t.b, t.head_k) : 1.f);
  }
};

/// Four columns of out; 0 where the row has seen nothing, whatever O is.
template <typename C>
FLASH_ATTN_DEVICE void store_out(typename C::Element* to, float4 o, float factor) {
  if (factor == 0.f) o = {0.f, 0.f, 0.f, 0.f};
  *reinterpret_cast<uint2*>(to) = {sm80::pack<typename C::Element>(o.x * factor, o.y * factor),
                                   sm80::pack<typename C::Element>(o.z * factor, o.w * factor)};
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
      *reinterpret_cast<float4*>(part.out + row * C::kHeadDim + column) = o;
    }
  }
}

/// The parts of CTAs [owner, last] of a tile. A warp has a row at a time, a lane four columns of all parts, which come
/// through `memory`, a stage, and of every kAtOnce parts the statistics of one.
template <typename C>
FLASH_ATTN_DEVICE void combine_parts(const DecodeParams& params, const TileInfo& t, int owner, int last,
                                     float* memory) {
  constexpr int kWarps = C::kConsumers / 32, kLineBytes = 32 * 16;
  constexpr int kRoom = C::kStageBytes / kWarps / kLineBytes, kAtOnce = kRoom >= 16 ? 16 : kRoom >= 8 ? 8 : 4;
  static_assert(kWarps * kAtOnce * kLineBytes <= C::kStageBytes);
  constexpr int kNext = 2 * C::kBlockM;  // rows from a CTA's part to the next one's, but for the owner's: part_place()
  const ForwardParams& p = params.problem;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float4* const mine = reinterpret_cast<float4*>(memory) + warp * kAtOnce * 32 + lane;
  const uint32_t to = shared_address(mine);
#pragma unroll 1
  for (int row = warp; row < t.rows; row += kWarps) {
#pragma unroll 1
    for (int column = 4 * lane; column - 4 * lane < p.head_dim_v; column += 128) {
      const bool exists = column < p.head_dim_v;
      float4 o = {0.f, 0.f, 0.f, 0.f};
      float high = -INFINITY, sum = 0.f;
#pragma unroll 1
      for (int first = owner; first <= last; first += kAtOnce) {
        const int count = min(kAtOnce, last - first + 1);
        const int64_t line = part_place(first, -1) * C::kBlockM + row;
        const int shift = first == owner ? C::kBlockM : 0;  // of the owner's own
        float2 part = {-INFINITY, 0.f};
        if (lane < count) {
          part = __ldcg(params.partial_statistics + line + lane * kNext + (lane == 0 ? shift : 0));
        }
        const float* from = params.partial_out + line * C::kHeadDim + column;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (i < count && exists) {
            sm80::cp_async_16(to + i * kLineBytes, from + (i * kNext + (i == 0 ? shift : 0)) * C::kHeadDim);
          }
        }
        sm80::cp_async_commit();
        float higher = part.x;
#pragma unroll
        for (int step = kAtOnce / 2; step > 0; step /= 2) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, step));
        higher = fmaxf(high, __shfl_sync(~0u, higher, 0));
        const float shrink = high == -INFINITY ? 0.f : sm80::fast_exp2(high - higher);
        high = higher;
        // 0: the part has seen nothing of the row, and its O may be NaN there.
        const float weight = part.y == 0.f ? 0.f : sm80::fast_exp2(part.x - high);
        float part_sum = weight * part.y;
#pragma unroll
        for (int step = kAtOnce / 2; step > 0; step /= 2) part_sum += __shfl_xor_sync(~0u, part_sum, step);
        sum = sum * shrink + __shfl_sync(~0u, part_sum, 0);
        o.x *= shrink, o.y *= shrink, o.z *= shrink, o.w *= shrink;
        sm80::cp_async_wait<0>();  // each lane reads what it has copied
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const float w = __shfl_sync(~0u, weight, i);
          if (w == 0.f || !exists) continue;
          const float4 x = mine[i * 32];
          o.x += w * x.x, o.y += w * x.y, o.z += w * x.z, o.w += w * x.w;
        }
      }
      const OutputRow<C> output(params, t, row);
      const float factor = output.finish(params, t, {high, sum}, column == 0);
      if (exists) store_out<C>(output.out(p, t) + column, o, factor);
    }
  }
}

/// All consumers of a CTA call it at the end of what it has of a tile; `merge` is in the stage that was used last.
template <typename C>
FLASH_ATTN_DEVICE void finish_tile(const DecodeParams& params, const TileInfo& t, const Share& share,
                                   const WarpState<C>& state, const WarpPlace<C>& place, const Merge<C>& merge,
                                   int* word) {
  const int owner = share.owner(t.first_unit), last = share.owner(t.first_unit + t.units - 1);
  RowSums part{nullptr, nullptr};
  if (owner != last) {
    const int64_t line = part_place(blockIdx.x, owner) * C::kBlockM;
    part = {params.partial_out + line * C::kHeadDim, params.partial_statistics + line};
  }
  merge_warps(t, state, place, merge,
              [&](int row, int row_place) { store_row(params, t, merge, row, row_place, part); });
  if (owner == last) return;
  consumers_sync<C>();  // the part is written
  if (threadIdx.x == 0) *word = arrive(params, owner) == last - owner;
  consumers_sync<C>();  // it is known who is last
  if (*word == 0) return;
  combine_parts<C>(params, t, owner, last, merge.sum);
  if (threadIdx.x == 0) close_arrivals(params, owner);
}

}  // namespace flash_attn::cuda::decode
