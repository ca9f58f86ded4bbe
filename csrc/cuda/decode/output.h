// The end of a tile: the warps' sums come together, and become rows of out and lse, or a part of a tile.
#pragma once

#include "block.h"
#include "loading.h"
#include "parts.h"

namespace flash_attn::cuda::decode {

/// Shared memory beside the stages.
template <typename C>
struct Merge {
  float* sum;          // (kBlockM, kHeadDim): O
  float2* statistics;  // (kWarpsN, kBlockM): row_max, row_sum
  unsigned char* queries;
  int* words;  // for find_share, and who is last
  Board board;

  FLASH_ATTN_DEVICE explicit Merge(unsigned char* memory) {
    sum = reinterpret_cast<float*>(memory);
    statistics = reinterpret_cast<float2*>(memory += C::kSumBytes);
    queries = memory += C::kStatisticsBytes;
    words = reinterpret_cast<int*>(memory += C::kQueryBytes);
    board.tiles = reinterpret_cast<TileInfo*>(memory += 64);
    board.blocks = reinterpret_cast<BlockInfo*>(board.tiles + Board::kTiles);
  }
  static constexpr int kBytes = C::kSumBytes + C::kStatisticsBytes + C::kQueryBytes + 64 + Board::kBytes;

  /// Few rows have a place for each warp's sum, (kWarpsN, rows, kHeadDim); else all warps add to one, (kBlockM,
  /// kHeadDim), relative to the row's maximum.
  FLASH_ATTN_DEVICE static bool apart(const TileInfo& t) { return t.rows * C::kWarpsN <= C::kBlockM; }

  /// Of all warps together: row_max and row_sum of a row.
  FLASH_ATTN_DEVICE float2 row(int row) const {
    float high = -INFINITY, sum = 0.f;
#pragma unroll
    for (int w = 0; w < C::kWarpsN; ++w) high = fmaxf(high, statistics[w * C::kBlockM + row].x);
#pragma unroll
    for (int w = 0; w < C::kWarpsN; ++w) {
      const float2 part = statistics[w * C::kBlockM + row];
      if (part.y != 0.f) sum += sm80::fast_exp2(part.x - high) * part.y;
    }
    return {high, sum};
  }

  /// Four columns of O, relative to `high`, the row's maximum.
  FLASH_ATTN_DEVICE float4 columns(const TileInfo& t, int row, int column, float high) const {
    if (!apart(t)) return *reinterpret_cast<const float4*>(sum + row * C::kHeadDim + column);
    float4 o = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int w = 0; w < C::kWarpsN; ++w) {
      const float2 part = statistics[w * C::kBlockM + row];
      if (part.y == 0.f) continue;  // the warp has seen nothing of the row, whose O may be NaN there
      const float weight = sm80::fast_exp2(part.x - high);
      const float4 x = *reinterpret_cast<const float4*>(sum + (w * t.rows + row) * C::kHeadDim + column);
      o.x += weight * x.x, o.y += weight * x.y, o.z += weight * x.z, o.w += weight * x.w;
    }
    return o;
  }
};

/// O of all warps into merge.sum. All threads call it.
template <typename C>
FLASH_ATTN_DEVICE void merge_warps(const TileInfo& t, const WarpState<C>& state, const WarpPlace<C>& place,
                                   Merge<C>& merge) {
  const int lane = threadIdx.x % 32, first = place.first_row;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sm80::quad_sum(state.softmax.row_sum[r]);
    if (lane % 4 == 0 && place.part == 0)
      merge.statistics[place.n * C::kBlockM + first + 8 * r] = {state.softmax.row_max[r], sum};
  }
  const auto line = [&](int row) {
    return reinterpret_cast<float2*>(merge.sum + row * C::kHeadDim + place.part * C::kColumns) + lane % 4;
  };
  if (Merge<C>::apart(t)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (first + 8 * r >= t.rows) continue;
      float2* const to = line(place.n * t.rows + first + 8 * r);
#pragma unroll
      for (int n = 0; n < WarpState<C>::kTiles; ++n) to[4 * n] = {state.o[n][2 * r], state.o[n][2 * r + 1]};
    }
    __syncthreads();  // everything is there
    return;
  }
  __syncthreads();  // statistics are there
  float weight[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float high = -INFINITY;
#pragma unroll
    for (int w = 0; w < C::kWarpsN; ++w) high = fmaxf(high, merge.statistics[w * C::kBlockM + first + 8 * r].x);
    weight[r] = state.softmax.row_max[r] == -INFINITY ? 0.f : sm80::fast_exp2(state.softmax.row_max[r] - high);
  }
#pragma unroll 1
  for (int w = 0; w < C::kWarpsN; ++w) {
    if (w == place.n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (first + 8 * r >= t.rows) continue;
        float2* const to = line(first + 8 * r);
#pragma unroll
        for (int n = 0; n < WarpState<C>::kTiles; ++n) {
          float2 x = {0.f, 0.f};
          if (w > 0) x = to[4 * n];
          if (weight[r] != 0.f) {
            x.x += weight[r] * state.o[n][2 * r];
            x.y += weight[r] * state.o[n][2 * r + 1];
          }
          to[4 * n] = x;
        }
      }
    }
    __syncthreads();  // warps of a row add in order
  }
}

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
  FLASH_ATTN_DEVICE float finish(const ForwardParams& p, const TileInfo& t, float2 statistics, bool writes) const {
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
    return empty ? 0.f : correction / sum;
  }
};

/// Four columns of out; 0 where the row has seen nothing, whatever O is.
template <typename C>
FLASH_ATTN_DEVICE void store_out(typename C::Element* to, float4 o, float factor) {
  if (factor == 0.f) o = {0.f, 0.f, 0.f, 0.f};
  *reinterpret_cast<uint2*>(to) = {sm80::pack<typename C::Element>(o.x * factor, o.y * factor),
                                   sm80::pack<typename C::Element>(o.z * factor, o.w * factor)};
}

/// A warp has a row at a time, a lane four columns.
template <typename C>
FLASH_ATTN_DEVICE void store_tile(const DecodeParams& params, const TileInfo& t, const Merge<C>& merge) {
  const ForwardParams& p = params.problem;
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < t.rows; row += C::kThreads / 32) {
    const OutputRow<C> output(params, t, row);
    const float2 statistics = merge.row(row);
    const float factor = output.finish(p, t, statistics, lane == 0);
    typename C::Element* const to = output.out(p, t);
    for (int column = 4 * lane; column < p.head_dim_v; column += 128) {
      store_out<C>(to + column, merge.columns(t, row, column, statistics.x), factor);
    }
  }
}

template <typename C>
FLASH_ATTN_DEVICE void store_part(const DecodeParams& params, const TileInfo& t, const Merge<C>& merge, int64_t place) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < t.rows; row += C::kThreads / 32) {
    const int64_t line = place * C::kBlockM + row;
    const float2 statistics = merge.row(row);
    if (lane == 0) params.partial_statistics[line] = statistics;
    for (int column = 4 * lane; column < params.problem.head_dim_v; column += 128) {
      *reinterpret_cast<float4*>(params.partial_out + line * C::kHeadDim + column) =
          merge.columns(t, row, column, statistics.x);
    }
  }
}

/// The parts of CTAs [owner, last] of a tile. A warp has a row at a time, a lane four columns of all parts, and of
/// every 32 parts the statistics of one.
template <typename C>
FLASH_ATTN_DEVICE void combine_parts(const DecodeParams& params, const TileInfo& t, int owner, int last) {
  constexpr int kAtOnce = 8;  // loads under way
  const ForwardParams& p = params.problem;
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < t.rows; row += C::kThreads / 32) {
    const auto line = [&](int cta) { return part_place(cta, owner) * C::kBlockM + row; };
    for (int column = 4 * lane; column - 4 * lane < p.head_dim_v; column += 128) {
      const bool mine = column < p.head_dim_v;
      float4 o = {0.f, 0.f, 0.f, 0.f};
      float high = -INFINITY, sum = 0.f;
      for (int first = owner; first <= last; first += kAtOnce) {
        float4 x[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (mine && first + i <= last) {
            x[i] = __ldcg(reinterpret_cast<const float4*>(params.partial_out + line(first + i) * C::kHeadDim + column));
          }
        }
        float2 part = {-INFINITY, 0.f};
        if (lane < kAtOnce && first + lane <= last) part = __ldcg(&params.partial_statistics[line(first + lane)]);
        float higher = part.x;
#pragma unroll
        for (int step = kAtOnce / 2; step > 0; step /= 2) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, step));
        higher = fmaxf(high, __shfl_sync(~0u, higher, 0));
        const float shrink = high == -INFINITY ? 0.f : sm80::fast_exp2(high - higher);
        high = higher;
        o.x *= shrink, o.y *= shrink, o.z *= shrink, o.w *= shrink;
        const float weight = part.y == 0.f ? 0.f : sm80::fast_exp2(part.x - high);
        sum *= shrink;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const float w = __shfl_sync(~0u, weight, i);
          sum += w * __shfl_sync(~0u, part.y, i);
          if (w == 0.f || !mine) continue;  // the part has seen nothing of the row, whose O may be NaN there
          o.x += w * x[i].x, o.y += w * x[i].y, o.z += w * x[i].z, o.w += w * x[i].w;
        }
      }
      const OutputRow<C> output(params, t, row);
      const float factor = output.finish(p, t, {high, sum}, column == 0);
      if (mine) store_out<C>(output.out(p, t) + column, o, factor);
    }
  }
}

/// All threads call it at the end of what this CTA has of a tile.
template <typename C>
FLASH_ATTN_DEVICE void finish_tile(const DecodeParams& params, const TileInfo& t, const Share& share,
                                   const WarpState<C>& state, const WarpPlace<C>& place, Merge<C>& merge) {
  merge_warps(t, state, place, merge);
  const int owner = share.owner(t.first_unit), last = share.owner(t.first_unit + t.units - 1);
  if (owner == last) return store_tile(params, t, merge);
  store_part(params, t, merge, part_place(blockIdx.x, owner));
  __syncthreads();  // the part is written
  if (threadIdx.x == 0) merge.words[0] = arrive(params, owner) == last - owner;
  __syncthreads();  // it is known who is last
  if (merge.words[0] == 0) return;
  combine_parts<C>(params, t, owner, last);
  if (threadIdx.x == 0) close_arrivals(params, owner);
}

}  // namespace flash_attn::cuda::decode
