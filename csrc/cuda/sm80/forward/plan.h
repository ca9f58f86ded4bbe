// Which kernel a forward problem gets, and how its tiles are laid out.
#pragma once

#include <cstdint>

#include "../../common/tiles/schedule.h"
#include "variant.h"

namespace flash_attn::cuda::sm80 {

struct ForwardPlan {
  const ForwardVariant* variant = nullptr;
  int blocks_per_sm = 0;  // that run at a time
  TileSchedule schedule;  // see ForwardKernelParams
  // Of the workspace, from its start, where a tile's keys are shared out.
  int64_t partial_out = 0, partial_out_bytes = 0;
  bool aligned = true;

  bool packs_mask = false;  // reads attn_mask once before, see mask/packed_mask.h
  int seen_words = 0;       // see ForwardKernelParams
  int64_t workspace_bytes = 0;

  bool is_split() const { return schedule.num_splits > 1; }
  /// Of a launch.
  int64_t num_blocks() const {
    const int64_t split = is_split() ? schedule.num_tiles - schedule.split_begin : 0;
    return schedule.num_tiles + split * (schedule.num_splits - 1);
  }
  int shared_bytes() const { return variant->tile_bytes + seen_words * 8; }
};

/// Whether q, k, v and out consist of whole, aligned 16-byte pieces.
bool is_aligned(const ForwardParams& params);
/// Anything beyond scaling by a positive factor, lengths, windows and sinks?
bool is_extended(const ForwardParams& params);
/// What the problem's kernel has to know.
Rules forward_rules(const ForwardParams& params);

/// Without a variant where none fits. Throws when FLASH_ATTN_FORWARD_KERNEL names one ("mma d128 128x64") that does not
/// take the problem.
ForwardPlan plan_forward(const ForwardParams& params, const DeviceInfo& device);

}  // namespace flash_attn::cuda::sm80
