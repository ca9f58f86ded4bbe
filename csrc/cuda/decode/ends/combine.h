// The parts that several CTAs have of a tile, put together.
#pragma once

#include "output.h"

namespace flash_attn::cuda::decode {

constexpr int kLineBytes = 32 * 16;  // 128 columns of a part's row

/// Stages that nobody else uses: the one that was used last, or all of them where the CTA has no more blocks.
struct FreeStages {
  unsigned char* stages;
  int count;
};

/// The parts of CTAs [owner, last]. A warp has kRows rows at a time, and of each kParts parts, a lane four columns of
/// all: they come through `memory`, so that all are under way together. Lane i works out what line i is multiplied by,
/// which is part i % kParts of row i / kParts. Of one row alone more parts may follow in turns.
template <typename C, int kRows, int kParts>
FLASH_ATTN_DEVICE void combine_rows(const DecodeParams& params, const TileInfo& t, int owner, int last,
                                    unsigned char* memory) {
  constexpr int kLines = kRows * kParts, kWarps = C::kConsumers / 32;
  constexpr int kNext = 2 * C::kBlockM;  // rows from a CTA's part to the next one's, but for the owner's: part_place()
  static_assert(kLines <= 32 && (kParts & (kParts - 1)) == 0);
  const ForwardParams& p = params.problem;
  uint32_t thread = threadIdx.x;
  forget_derived(thread);  // else what follows from it stands in registers while blocks are processed
  const int lane = int(thread) % 32, warp = int(thread) / 32, rows = t.rows;
  const float4* const mine = reinterpret_cast<const float4*>(memory) + warp * kLines * 32 + lane;
  const uint32_t to = shared_address(mine);
#pragma unroll 1
  for (int first_row = warp; first_row < rows; first_row += kWarps * kRows) {
#pragma unroll 1
    for (int column = 4 * lane; column - 4 * lane < p.head_dim_v; column += 128) {
      const bool exists = column < p.head_dim_v;
      float4 o = {0.f, 0.f, 0.f, 0.f};
      float high = -INFINITY, sum = 0.f;  // of the row of this lane's line
#pragma unroll 1
      for (int first = owner; first <= last; first += kParts) {
        const int count = last - first + 1;  // of parts that are left
        const auto is_there = [&](int i) { return i % kParts < count && first_row + i / kParts * kWarps < rows; };
        const auto line = [&](int i) { return i % kParts * kNext + i / kParts * kWarps; };
        const int64_t begin = part_place(first, -1) * C::kBlockM + first_row;
        const int shift = first == owner ? C::kBlockM : 0;  // to the owner's own
        float2 part = {-INFINITY, 0.f};
        if (lane < kLines && is_there(lane)) {
          part = __ldcg(params.partial_statistics + begin + line(lane) + (lane % kParts == 0 ? shift : 0));
        }
        const float* const from = params.partial_out + begin * C::kHeadDimV + column;
#pragma unroll
        for (int i = 0; i < kLines; ++i) {
          if (!is_there(i) || !exists) continue;
          sm80::cp_async_16(to + i * kLineBytes, from + (line(i) + (i % kParts == 0 ? shift : 0)) * C::kHeadDimV);
        }
        sm80::cp_async_commit();
        float higher = part.x;
#pragma unroll
        for (int step = kParts / 2; step > 0; step /= 2) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, step));
        higher = fmaxf(high, higher);
        const float shrink = high == -INFINITY ? 0.f : sm80::fast_exp2(high - higher);
        high = higher;
        // 0: the part has seen nothing of the row, and its O may be NaN there.
        const float weight = part.y == 0.f ? 0.f : sm80::fast_exp2(part.x - high);
        float part_sum = weight * part.y;
#pragma unroll
        for (int step = kParts / 2; step > 0; step /= 2) part_sum += __shfl_xor_sync(~0u, part_sum, step);
        sum = sum * shrink + part_sum;
        const float old = __shfl_sync(~0u, shrink, 0);
        o.x *= old, o.y *= old, o.z *= old, o.w *= old;
        sm80::cp_async_wait<0>();  // each lane reads what it has copied
#pragma unroll 1
        for (int r = 0; r < kRows && first_row + r * kWarps < rows; ++r) {
#pragma unroll
          for (int i = 0; i < kParts; ++i) {
            const float w = __shfl_sync(~0u, weight, r * kParts + i);
            if (w == 0.f || !exists) continue;
            const float4 x = mine[(r * kParts + i) * 32];
            o.x += w * x.x, o.y += w * x.y, o.z += w * x.z, o.w += w * x.w;
          }
          if (kRows == 1 && count > kParts) break;  // more of it follows
          const float2 statistics = {__shfl_sync(~0u, high, r * kParts), __shfl_sync(~0u, sum, r * kParts)};
          const OutputRow<C> output(params, t, first_row + r * kWarps);
          const float factor = output.finish(params, t, statistics, column == 0);
          if (exists) store_out<C>(output.out(p, t) + column, o, factor);
          o = {0.f, 0.f, 0.f, 0.f};
        }
      }
    }
  }
}

/// All consumers call it.
template <typename C>
FLASH_ATTN_DEVICE void combine_parts(const DecodeParams& params, const TileInfo& t, int owner, int last,
                                     const FreeStages& free) {
  constexpr int kRoom = C::kStageBytes / (C::kConsumers / 32) / kLineBytes, kLines = kRoom >= 16  ? 16
                                                                                     : kRoom >= 8 ? 8
                                                                                                  : 4;
  static_assert(kRoom >= kLines);
  if constexpr (C::kBlockM > 16) {  // a warp has many rows
    constexpr int kAtOnce = 32;     // lines, in all stages
    if (free.count * kRoom >= kAtOnce) {
      if (last - owner < 4) return combine_rows<C, kAtOnce / 4, 4>(params, t, owner, last, free.stages);
      if (last - owner < 16) return combine_rows<C, kAtOnce / 16, 16>(params, t, owner, last, free.stages);
    }
  }
  combine_rows<C, 1, kLines>(params, t, owner, last, free.stages);
}

}  // namespace flash_attn::cuda::decode
