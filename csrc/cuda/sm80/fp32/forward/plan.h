// Which kernel a float32 forward problem gets, and how its tiles are laid out.
#pragma once

#include <cstdint>

#include "../../../../kernel.h"
#include "../../../common/tiles/schedule.h"
#include "../kernels.h"

namespace flash_attn::cuda::sm80::fp32 {

struct ForwardPlan {
  const ForwardVariant* variant = nullptr;
  const char* products = "";  // see Kernels
  int slots = 0;              // of the ring of K and V tiles
  int blocks_per_sm = 0;      // that run at a time
  TileSchedule schedule;

  Planes q, k, v;  // without addresses
  // Of the workspace, in bytes from its start, where the flags are.
  int64_t q_data = 0, k_data = 0, v_data = 0, q_units = 0, k_units = 0, v_units = 0;
  bool packs_mask = false;                     // see sm80::packs_mask()
  int64_t packed_mask = 0, unpacked_mask = 0;  // the other one is for flagged heads
  int64_t workspace_bytes = 0;

  int shared_bytes() const { return variant->query_bytes + slots * variant->slot_bytes; }
};

/// Why its kernels, of either pass, are not for this problem or not for this device; null: nothing speaks against it.
const char* refuses(const ForwardParams& params, const DeviceInfo& device, const Kernels& kernels);

/// Without a variant where none fits. Throws when FLASH_ATTN_FORWARD_KERNEL names one ("mma fp32 d128 128x64") that
/// does not take the problem.
ForwardPlan plan_forward(const ForwardParams& params, const DeviceInfo& device, const Kernels& kernels);

Plan describe(const ForwardPlan& plan);

void launch_forward(const ForwardParams& params, const ForwardPlan& plan, const DeviceInfo& device, void* stream);

}  // namespace flash_attn::cuda::sm80::fp32
