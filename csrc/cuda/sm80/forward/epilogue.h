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
      const bool empty = factor == 0.f;  // O, which may hold NaN then, is not multiplied by 0
      if (lane % 4 == 0 && warp % kWarpsD == 0 && tile.m_begin + row < int(tile.sequence.seqlen_q)) {
        const RowView& view = p.lse;
        static_cast<float*>(view.data)[((p.cu_seqlens_q != nullptr) ? 0 : tile.batch * view.batch) +
                                       tile.head * view.head + (tile.sequence.q_row + tile.m_begin + row) * view.row] =
            lse;
      }
      if (empty) {
#pragma unroll
        for (int d = 0; d < kDTiles; ++d) o[m][d][2 * r] = o[m][d][2 * r + 1] = 0.f;
      }
#pragma unroll
      for (int d = 0; d < kDTiles; ++d) {
        o[m][d][2 * r] *= factor * dropout_scale, o[m][d][2 * r + 1] *= factor * dropout_scale;
      }
    }
#pragma unroll
    for (int d = 0; d < kDTiles; d += 2) {
      const uint32_t a[4] = {pack<Element>(o[m][d][0], o[m][d][1]), pack<Element>(o[m][d][2], o[m][d][3]),
                             pack<Element>(o[m][d + 1][0], o[m][d + 1][1]),
                             pack<Element>(o[m][d + 1][2], o[m][d + 1][3])};
      store_fragment<Tile>(q_tile(), warp_row() + 16 * m, chunk(d) / 2, lane, a);
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
  const auto piece = [](uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address));
    return x;
  };
  if constexpr (!kDropout || !Config::kPacks) {                     // else ptxas would spill registers
    if (whole && rows >= kBlockM && columns == Config::kHeadDim) {  // nearly always
      // 32 lanes have kPeriod rounds for kStep rows, and then the same again.
      constexpr int kPeriod = kDTiles % 3 == 0 ? 3 : 1, kStep = 32 * kPeriod / kDTiles;
      static_assert(32 * kPeriod % kDTiles == 0 && Config::kWarpRows % kStep == 0 && (Tile::kWholeLines || kStep == 8));
      const int64_t step = kStep * p.out.row;
#pragma unroll
      for (int round = 0; round < kPeriod; ++round) {
        const int i = lane + 32 * round, row = warp_row() + i / kDTiles, at = chunk(i % kDTiles);
        const uint32_t from = q_tile() + Tile::offset(row, at);
        Element* to = out + row * p.out.row + 8 * at;
#pragma unroll 8
        for (int further = 0; further < Config::kWarpRows; further += kStep, to += step) {
          *reinterpret_cast<uint4*>(to) = piece((from ^ (further % 8 * 16)) + further * Tile::kRowBytes);
        }
      }
      return;
    }
  }
#pragma unroll 4
  for (int i = lane; i < Config::kWarpRows * kDTiles; i += 32) {
    const int row = warp_row() + i / kDTiles, at = chunk(i % kDTiles);
    if (row >= rows || 8 * at >= columns) continue;
    const uint4 x = piece(q_tile() + Tile::offset(row, at));
    Element* const to = out + row * p.out.row + 8 * at;
    if (whole) {
      *reinterpret_cast<uint4*>(to) = x;
    } else {
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (8 * at + c < columns) {
          reinterpret_cast<uint16_t*>(to)[c] = uint16_t(words[c / 2] >> (16 * (c % 2)));
        }
      }
    }
  }
}

}  // namespace flash_attn::cuda::sm80
