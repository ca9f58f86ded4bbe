// ForwardBlock: from O to out and lse.
#pragma once

#include "../tiles.h"
#include "block.h"

namespace flash_attn::cuda::sm80::fp32 {

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::store() {
  const float sink = p.sinks != nullptr ? static_cast<const float*>(p.sinks)[tile.head] : -INFINITY;
  float* const out = static_cast<float*>(p.out.data) + tile.batch_offset(p.out, is_packed_q()) +
                     int64_t{tile.head} * p.out.head + (tile.sequence.q_row + tile.m_begin) * p.out.row;
  float* const lse_rows = static_cast<float*>(p.lse.data) + (is_packed_q() ? 0 : tile.batch * p.lse.batch) +
                          tile.head * p.lse.head + (tile.sequence.q_row + tile.m_begin) * p.lse.row;
  const int rows = int(tile.sequence.seqlen_q) - tile.m_begin;
  float dropout_scale = 1.f;
  if constexpr (kExtended) {
    if (p.dropout_p > 0.0) dropout_scale = float(make_dropout(p.rng_state, p.dropout_p).scale);
  }
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp() * Config::kWarpRows + 16 * m + 8 * r + lane() / 4;
      float lse;
      const float factor = softmax.finish(m, r, kExtended ? 1.f : float(p.softmax_scale), sink, lse) * dropout_scale;
      if (row >= rows) continue;
      if (lane() % 4 == 0) lse_rows[row * p.lse.row] = lse;
      float* const to = out + row * p.out.row + lane() % 4 * 2;
#pragma unroll
      for (int d = 0; d < kDTiles; ++d) {
        store_two(to + 8 * d, o[m][d][2 * r] * factor, o[m][d][2 * r + 1] * factor,
                  int(p.head_dim_v) - 8 * d - lane() % 4 * 2, params.aligned);
      }
    }
  }
}

}  // namespace flash_attn::cuda::sm80::fp32
