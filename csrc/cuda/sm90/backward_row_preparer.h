// What is left to do for the rows that a tile prepares when its consumers have computed delta (backward_prepare.h): a
// warp's work.
#pragma once

#include "backward_config.h"

namespace flash_attn::sm90 {

/// Has few registers: what it works on lies in shared memory (PreparedBlock), and nothing is kept from one block to the
/// next.
template <typename Config>
struct RowPreparer {
  using Element = typename Config::Element;
  static constexpr int kBlockM = Config::kBlockM;

  const BackwardKernelParams& params;
  BackwardStorage<Config>& shared;

  SM90_DEVICE void begin_block(int index) {
    const PreparedPlace at = prepared_place(params, index);
    PreparedBlock& block = shared.prepared;
    block.head = at.all_heads;
    block.row = at.m_block * kBlockM;
    block.first_row = at.block * kBlockM;
    block.lse = first_of(params.problem.lse, at, block.row);
    block.dlse = params.preparation.dlse.data != nullptr ? first_of(params.preparation.dlse, at, block.row) : nullptr;
  }

  SM90_DEVICE float load(const float* first, int64_t stride, int row, float outside) const {
    return shared.prepared.row + row < params.seqlen_q ? first[row * stride] : outside;
  }

  SM90_DEVICE void subtract_dlse(float* deltas) {
#pragma unroll 1
    for (int row = lane_id(); row < kBlockM; row += 32) {
      deltas[row] -= load(shared.prepared.dlse, params.preparation.dlse.row, row, 0.f);
    }
  }

  /// Two rows a lane at a time, whose lse come from memory together.
  SM90_DEVICE void write_statistics(const float* deltas) {
#pragma unroll 1
    for (int row = lane_id(); row < kBlockM; row += 64) {
      float lse[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) lse[i] = load(shared.prepared.lse, params.problem.lse.row, row + 32 * i, -INFINITY);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        params.statistics[shared.prepared.first_row + row + 32 * i] =
            row_statistics<Element>(lse[i], deltas[row + 32 * i], params.inverse_scale);
      }
    }
  }

  SM90_DEVICE void prepare_rows(const BackwardTile& tile, uint32_t phase) {
    mbarrier_wait(&shared.deltas_full, phase);
#pragma unroll 1
    for (int i = 0; i < tile.prepared_end - tile.prepared_begin; ++i) {
      if (lane_id() == 0) begin_block(tile.prepared_begin + i);
      __syncwarp();
      if (shared.prepared.dlse != nullptr) subtract_dlse(shared.deltas + i * kBlockM);
      write_statistics(shared.deltas + i * kBlockM);
      if (params.preparation.zeroes_dq) {
        zero_block<kBlockM * 64 * Config::kPanels / 4>(params, shared.prepared.first_row / kBlockM);
      }
      __syncwarp();
      if (lane_id() == 0) add_to_count(params.preparation.prepared + shared.prepared.head);
    }
    mbarrier_arrive(&shared.deltas_empty);
  }
};

}  // namespace flash_attn::sm90
