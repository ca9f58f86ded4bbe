// What consumers do with dq themselves: their fragments of dQ become rows of it, where a CTA has all of a head's, and
// when the dq writer (dq/writer.h) leaves the last shares to them.
#pragma once

#include "writer.h"

namespace flash_attn::cuda::sm90::backward {

/// Of a thread of a consumer: refers to what the consumer keeps.
template <typename Config>
struct DqRows {
  using Element = typename Config::Element;
  static constexpr int kBlockM = Config::kBlockM;
  static constexpr int kDqSize = kDqTile / 128;       // floats a thread of 64 x 64
  static constexpr int kShareBlocks = 128 / kBlockM;  // of a usual share: as many queries as keys

  const KernelParams& params;
  single::SharedStorage<Config>& shared;
  const int &warpgroup, &warp, &lane;

  /// `x`: this warpgroup's 64 x 64 of a block of dQ, whose first row is block_row of `rows`.
  FLASH_ATTN_DEVICE void store(const float (&x)[kDqSize], int batch, int head, int block_row, int64_t rows) {
    constexpr bool kHalfOfColumns = kBlockM == 64;
    const ForwardParams& p = params.problem;
    const float scale = params.softmax_scale;
    const int row = block_row + (kHalfOfColumns ? 0 : 64 * warpgroup) + 16 * warp + lane / 4;
    const int col = kHalfOfColumns ? 64 * warpgroup : 0, cols = static_cast<int>(p.head_dim) - col;
    uint16_t* const to = static_cast<uint16_t*>(params.dq.data) + batch * params.dq.batch + row * params.dq.row +
                         head * params.dq.head + col + 2 * (lane % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r >= rows) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (8 * j >= cols) continue;
        const uint32_t pair = pack<Element>(x[4 * j + 2 * r] * scale, x[4 * j + 2 * r + 1] * scale);
        *reinterpret_cast<uint32_t*>(to + 8 * r * params.dq.row + 8 * j) = pair;
      }
    }
  }

  FLASH_ATTN_DEVICE void write_share_blocks(const DqShare& share, int head, int m_block) {
    float x[kShareBlocks][kDqSize];
#pragma unroll
    for (int b = 0; b < kShareBlocks; ++b) {
      // Of fewer blocks the last one again: no branch parts the loads.
      const int64_t block = share.first_block + head * params.num_blocks + min(m_block + b, share.end - 1);
      const float4* const from = reinterpret_cast<const float4*>(params.dq_accum) +
                                 (block * Config::kConsumers + warpgroup) * (kDqTile / 4) + warp * (kDqTile / 16) +
                                 lane;
#pragma unroll
      for (int i = 0; i < kDqSize; i += 4) {
        const float4 y = __ldcg(from + i / 4 * 32);
        x[b][i] = y.x;
        x[b][i + 1] = y.y;
        x[b][i + 2] = y.z;
        x[b][i + 3] = y.w;
      }
    }
#pragma unroll
    for (int b = 0; b < kShareBlocks; ++b) {
      if (m_block + b < share.end) {
        store(x[b], share.q_batch, share.q_head + head, share.row + (m_block + b) * kBlockM,
              share.row + share.seqlen_q);
      }
    }
  }

  /// What the dq writer leaves, see Writer::leave_rest_to_consumers.
  FLASH_ATTN_DEVICE void write_last_shares() {
    for (uint32_t round = 0;; ++round) {
      mbarrier_wait(&shared.share_full, round % 2);
      const DqShare& share = shared.share;
      if (share.end < 0) break;
#pragma unroll 1
      for (int head = 0; head < params.split.heads_of_tile; ++head) {
#pragma unroll 1
        for (int m_block = share.begin; m_block < share.end; m_block += kShareBlocks) {
          write_share_blocks(share, head, m_block);
        }
      }
      mbarrier_arrive(&shared.share_empty);
    }
  }
};

}  // namespace flash_attn::cuda::sm90::backward
