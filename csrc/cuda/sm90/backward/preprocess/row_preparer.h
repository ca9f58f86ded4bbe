// What is left to do for the rows that a tile prepares when its consumers have computed delta
// (preprocess/prepared_rows.h): a warp's work.
#pragma once

#include "../single/config.h"

namespace flash_attn::cuda::sm90::backward {

/// Has few registers: what it works on lies in shared memory (PreparedBlock), and nothing is kept from one block to the
/// next.
template <typename Config>
struct RowPreparer {
  using Element = typename Config::Element;
  static constexpr int kBlockM = Config::kBlockM;

  const KernelParams& params;
  single::SharedStorage<Config>& shared;

  FLASH_ATTN_DEVICE void begin_block(int i) {
    const QueryShare& share = shared.prepared_share;
    const BlockOfShare at = block_of_share(share, i);
    PreparedBlock& block = shared.prepared;
    block.count = prepared_count(params, share.batch_head, at.head);
    block.rows_left = share.seqlen_q - at.m_block * kBlockM;
    block.block = share.first_block + at.head * params.num_blocks + at.m_block;
    block.lse = first_of(params.problem.lse, share, at, kBlockM);
    block.dlse =
        params.preparation.dlse.data != nullptr ? first_of(params.preparation.dlse, share, at, kBlockM) : nullptr;
  }

  FLASH_ATTN_DEVICE float load(const float* first, int64_t stride, int row, float outside) const {
    return row < shared.prepared.rows_left ? first[row * stride] : outside;
  }

  FLASH_ATTN_DEVICE void subtract_dlse(float* deltas) {
#pragma unroll 1
    for (int row = lane_id(); row < kBlockM; row += 32) {
      deltas[row] -= load(shared.prepared.dlse, params.preparation.dlse.row, row, 0.f);
    }
  }

  /// Two rows a lane at a time, whose lse come from memory together.
  FLASH_ATTN_DEVICE void write_statistics(const float* deltas) {
#pragma unroll 1
    for (int row = lane_id(); row < kBlockM; row += 64) {
      float lse[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) lse[i] = load(shared.prepared.lse, params.problem.lse.row, row + 32 * i, -INFINITY);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        params.statistics[int64_t{shared.prepared.block} * kBlockM + row + 32 * i] =
            row_statistics<Element>(lse[i], deltas[row + 32 * i], params.softmax_scale, params.inverse_scale);
      }
    }
  }

  FLASH_ATTN_DEVICE void prepare_rows(const Tile& tile, uint32_t phase) {
    mbarrier_wait(&shared.deltas_full, phase);
#pragma unroll 1
    for (int i = 0; i < tile.prepared_blocks; ++i) {
      if (lane_id() == 0) begin_block(i);
      __syncwarp();
      if (shared.prepared.dlse != nullptr) subtract_dlse(shared.deltas + i * kBlockM);
      write_statistics(shared.deltas + i * kBlockM);
      if (params.preparation.zeroes_dq) {
        zero_block<kBlockM * 64 * Config::kPanels / 4>(params, shared.prepared.block);
      }
      __syncwarp();
      if (lane_id() == 0) add_to_count(shared.prepared.count);
    }
    mbarrier_arrive(&shared.deltas_empty);
  }
};

}  // namespace flash_attn::cuda::sm90::backward
