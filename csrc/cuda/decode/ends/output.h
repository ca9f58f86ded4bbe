// Rows of out and lse.
#pragma once

#include "../rows/softmax.h"
#include "../sharing/parts.h"

namespace flash_attn::cuda::decode {

/// Where a CTA's part of a tile is written, whose sums are not divided yet.
struct RowSums {
  float* out;          // (kBlockM, kHeadDimV), relative to the row's maximum; null: the CTA has all of the tile
  float2* statistics;  // (kBlockM): row_max in log2, row_sum
};

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

}  // namespace flash_attn::cuda::decode
