// The end of a tile whose rows are each in one warp: straight from its registers to memory.
#pragma once

#include "output.h"

namespace flash_attn::cuda::decode {

/// `o` is what the lane has of rows first_row and first_row + 8, from column first_column on: of each 8 columns a pair,
/// or of float8 caches of each 16 four that follow each other. row_sum is of the lane's keys alone.
template <typename C, int kTiles>
FLASH_ATTN_DEVICE void store_lane_rows(const DecodeParams& params, const TileInfo& t, int first_row, int first_column,
                                       const float (&o)[kTiles][4], const Softmax<C>& softmax, const RowSums& part) {
  using Element = typename C::Element;
  constexpr int kPieces = C::kFloat8 ? kTiles / 2 : kTiles, kWidth = 8 * kTiles / kPieces;
  const ForwardParams& p = params.problem;
  uint32_t thread = threadIdx.x;
  forget_derived(thread);  // else what follows from it stands in registers while blocks are processed
  const int lane = int(thread) % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 8 * r;
    const float sum = sm80::quad_sum(softmax.row_sum[r]);
    if (row >= t.rows) continue;
    const bool speaks = lane == 0 && first_column == 0;
    Element* out = nullptr;
    float* sums = nullptr;
    float factor = 0.f;
    if (part.out == nullptr) {
      const OutputRow<C> output(params, t, row);
      factor = output.finish(params, t, {softmax.row_max[r], sum}, speaks);
      out = output.out(p, t);
    } else {
      if (speaks) part.statistics[row] = {softmax.row_max[r], sum};
      sums = part.out + row * C::kHeadDimV;
    }
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      const int column = first_column + kWidth * n + kWidth / 4 * lane;
      if (column >= p.head_dim_v) continue;
      if constexpr (C::kFloat8) {
        const float4 x = {o[2 * n][2 * r], o[2 * n + 1][2 * r], o[2 * n][2 * r + 1], o[2 * n + 1][2 * r + 1]};
        if (part.out == nullptr) {
          store_out<C>(out + column, x, factor);
        } else {
          *reinterpret_cast<float4*>(sums + column) = x;
        }
      } else {
        const float2 x = {o[n][2 * r], o[n][2 * r + 1]};
        if (part.out == nullptr) {
          *reinterpret_cast<uint32_t*>(out + column) =
              factor == 0.f ? 0u : sm80::pack<Element>(x.x * factor, x.y * factor);
        } else {
          *reinterpret_cast<float2*>(sums + column) = x;
        }
      }
    }
  }
}

}  // namespace flash_attn::cuda::decode
