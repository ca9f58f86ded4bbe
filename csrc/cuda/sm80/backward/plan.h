// Which backward kernel runs a problem, and what it needs.
#pragma once

#include <cuda_runtime_api.h>

#include "../../../kernel.h"
#include "variant.h"

namespace flash_attn::cuda::sm80 {

struct BackwardPlan {
  const BackwardVariant* variant = nullptr;
  const MaskGradientVariant* mask_gradient = nullptr;  // if it is wanted
  bool aligned = false;
  int64_t num_m_blocks = 0, num_n_blocks = 0;  // see BackwardKernelParams
  int64_t num_row_blocks = 0, num_tiles = 0;   // blocks of query rows of all heads; blocks of keys likewise
  int share_rows = 0;                          // see BackwardKernelParams
  int parts = 1;                               // of the query rows that see a tile's keys, see BackwardKernelParams
  bool ordered = false;                        // blocks of keys add to dq by turns
  int spread = 0;                              // see BackwardKernelParams
  bool adds_mask_gradient = false;             // in the main kernel, as dS comes
  bool packs_mask = false;                     // reads attn_mask once before, see packed_mask.h
  // Of the workspace, in bytes from its start.
  int64_t minus_lse = 0, minus_delta = 0, turns = 0, next_tile = 0, slope_sums = 0;
  int64_t dk_parts = 0, dv_parts = 0;
  int64_t packed_mask = 0;
  int64_t workspace_bytes = 0;

  int row_shares() const { return variant->block_m / share_rows; }
};

/// The plan's variant is null where no kernel fits the device. Throws when FLASH_ATTN_BACKWARD_KERNEL asks for one that
/// does not take the problem, or that there is not.
BackwardPlan plan_backward(const BackwardParams& params, const DeviceInfo& device);

void launch_backward(const BackwardPlan& plan, const BackwardParams& params, cudaStream_t stream);

}  // namespace flash_attn::cuda::sm80
