// ForwardBlock: from O to out and lse.
#pragma once

#include "block.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::store() {
  typename Softmax::RowValues sums;
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) sums[m][0] = softmax.row_sum[m][0], sums[m][1] = softmax.row_sum[m][1];
  if constexpr (kWarpsD > 1) {
    combine_rows(sums, [](float x) { return quad_sum(x); }, [](float x, float y) { return x + y; });
  } else {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) sums[m][0] = quad_sum(sums[m][0]), sums[m][1] = quad_sum(sums[m][1]);
  }
  float dropout_scale = 1.f;
  if constexpr (kExtended) {
    if (p.dropout_p > 0.0) dropout_scale = float(make_dropout(p.rng_state, p.dropout_p).scale);
  } else if constexpr (kDropout) {
    dropout_scale = float(tile.dropout.scale);
  }
  if (tile.part_row >= 0) {
    store_part(sums, dropout_scale);
    return;
  }
  const float sink = p.sinks != nullptr ? static_cast<const float*>(p.sinks)[tile.head] : -INFINITY;
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row() + 16 * m + 8 * r + lane / 4;
      float lse;
      const float factor = softmax.finish(m, r, sums[m][r], sink, lse);
      const bool empty = factor == 0.f;  // selected, not multiplied by 0: O may hold NaN then
      if (lane % 4 == 0 && warp % kWarpsD == 0 && tile.m_begin + row < int(tile.sequence.seqlen_q)) {
        const RowView& view = p.lse;
        static_cast<float*>(view.data)[((p.cu_seqlens_q != nullptr) ? 0 : tile.batch * view.batch) +
                                       tile.head * view.head + (tile.sequence.q_row + tile.m_begin + row) * view.row] =
            lse;
      }
#pragma unroll
      for (int d = 0; d < kDTiles; ++d) {
        const float x = empty ? 0.f : o[m][d][2 * r] * (factor * dropout_scale);
        const float y = empty ? 0.f : o[m][d][2 * r + 1] * (factor * dropout_scale);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(q_tile() + Tile::offset(row, chunk(d)) + 4 * (lane % 4)),
                     "r"(pack<Element>(x, y))
                     : "memory");
      }
    }
  }
  __syncwarp();
  store_rows();
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::store_part(const typename Softmax::RowValues& sums, float dropout_scale) const {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = tile.part_row + warp_row() + 16 * m + 8 * r + lane / 4;
      if (lane % 4 == 0 && warp % kWarpsD == 0) {
        params.schedule.partial_statistics[row] = {softmax.reference(m, r), sums[m][r]};
      }
      float* const to = params.schedule.partial_out + row * Config::kHeadDim + 2 * (lane % 4);
#pragma unroll
      for (int d = 0; d < kDTiles; ++d) {
        *reinterpret_cast<float2*>(to + 8 * chunk(d)) = {o[m][d][2 * r] * dropout_scale,
                                                         o[m][d][2 * r + 1] * dropout_scale};
      }
    }
  }
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::store_rows() {
  Element* const out = static_cast<Element*>(p.out.data) + tile.batch_offset(p.out, p.cu_seqlens_q != nullptr) +
                       int64_t{tile.head} * p.out.head + (tile.sequence.q_row + tile.m_begin) * p.out.row;
  const int rows = int(tile.sequence.seqlen_q) - tile.m_begin, columns = int(p.head_dim_v);
  const bool whole = !kExtended || params.aligned;
#pragma unroll 4
  for (int i = lane; i < Config::kWarpRows * kDTiles; i += 32) {
    const int row = warp_row() + i / kDTiles, at = chunk(i % kDTiles);
    if (row >= rows || 8 * at >= columns) continue;
    uint32_t x[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(q_tile() + Tile::offset(row, at)));
    Element* const to = out + row * p.out.row + 8 * at;
    if (whole) {
      *reinterpret_cast<uint4*>(to) = make_uint4(x[0], x[1], x[2], x[3]);
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (8 * at + c < columns) {
          reinterpret_cast<uint16_t*>(to)[c] = uint16_t(x[c / 2] >> (16 * (c % 2)));
        }
      }
    }
  }
}

}  // namespace flash_attn::cuda::sm80
