// Which kernel a forward problem gets, and how its tiles are laid out.
#pragma once

#include <cstdint>

#include "variant.h"

namespace flash_attn::cuda::sm80 {

struct ForwardPlan {
  const ForwardVariant* variant = nullptr;
  int slots = 0;             // of the ring of K and V tiles
  int blocks_per_sm = 0;     // that run at a time
  int64_t num_m_blocks = 0;  // see ForwardKernelParams
  int64_t num_tiles = 0;
  int heads_per_group = 1;
  bool longest_first = false;
  bool aligned = true;

  bool packs_mask = false;  // reads attn_mask once before, see mask/packed_mask.h
  int seen_words = 0;       // see ForwardKernelParams
  int64_t workspace_bytes = 0;

  int shared_bytes() const { return variant->query_bytes + slots * variant->slot_bytes + seen_words * 8; }
};

/// Whether q, k, v and out consist of whole, aligned 16-byte pieces.
bool is_aligned(const ForwardParams& params);
/// Anything beyond scaling by a positive factor, lengths, windows and sinks?
bool is_extended(const ForwardParams& params);

/// Without a variant where none fits. Throws when FLASH_ATTN_FORWARD_KERNEL names one ("mma d128 128x64") that does not
/// take the problem.
ForwardPlan plan_forward(const ForwardParams& params, const DeviceInfo& device);

}  // namespace flash_attn::cuda::sm80
