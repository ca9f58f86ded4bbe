// Which kernel runs a problem, and how its tiles are shared out. Everything here is arithmetic on sizes known to the
// host; lengths on the device count as their upper bounds, or as the mean with cu_seqlens.
#pragma once

#include <cuda_runtime_api.h>

#include "../../../kernel.h"
#include "../../common/tiles/schedule.h"
#include "../../mask/bad_rows.h"
#include "../../mask/band.h"
#include "../../mask/packed_mask.h"

namespace flash_attn::cuda::sm90::forward {

struct Plan;

/// One compiled kernel, for bf16 and fp16, and its constants in the model of plan.cpp, fitted to an H200.
struct Variant {
  const char* name;
  int head_dim, head_dim_v;  // the largest it takes
  bool masked;
  bool biased;      // takes an additive attn_mask; others take none
  bool staged;      // and it comes by the copy engine
  bool rules;       // takes softcap, ALiBi and dropout
  bool out_buffer;  // out does not go through Q's buffer
  bool cluster;     // the parts of a tile are a cluster's; takes no packed query rows
  int block_m, block_n;
  double efficiency;   // share of the tensor cores' peak in the middle of a long tile
  double tile_clocks;  // a tile's fixed cost: filling and draining the pipeline
  void (*launch_bf16)(const ForwardParams&, const Plan&, cudaStream_t);
  void (*launch_fp16)(const ForwardParams&, const Plan&, cudaStream_t);
};

struct Variants {
  const Variant* first;
  int count;
  const Variant* begin() const { return first; }
  const Variant* end() const { return first + count; }
};

// Each in its own .cu file, the smallest head dimensions first.
extern const Variants kD64, kD96, kD128, kD192V128, kD192, kD256V128, kD256;
extern const Variants kExtendedD64, kExtendedD96, kExtendedD128, kExtendedD192, kExtendedD256;
extern const Variants kBandD64, kBandD96, kBandD128, kBandD192, kBandD256;  // one of each, see BandParams

struct Plan {
  const Variant* variant = nullptr;
  TileSchedule schedule{};  // its pointers are set by place_workspace()
  int grid = 0;
  bool dynamic = false;            // CTAs take tiles from a common counter
  double clocks = 0;               // what the model expects, to compare plans
  bool packs_mask = false;         // reads attn_mask once before, see mask/packed_mask.h
  mask::PackedMask packed;         // then
  mask::BadRows bad_rows;          // of V, where an additive mask is not packed
  void* mask_workspace = nullptr;  // for one of the two; set by place_workspace() as well
  bool depends_on_kind = false;    // of attn_mask: other plans come before, see choose_band_plan(), choose_bits_plan()
  mask::KindCondition condition;   // then

  bool needs_prepare() const { return schedule.order == TileSchedule::kPacked; }
  bool is_split() const { return schedule.num_splits > 1; }
  /// The parts of tiles go through memory.
  bool has_partials() const { return is_split() && !variant->cluster; }
};

/// Bytes that the plan needs; with `workspace` also sets the schedule's pointers into it.
int64_t place_workspace(Plan& plan, const ForwardParams& params, void* workspace);

/// The plan that the model expects to be fastest; with FLASH_ATTN_FORWARD_KERNEL, of the kernels so named (for tests
/// and measurements), or std::runtime_error if the problem's head dimensions have none.
Plan choose_plan(const ForwardParams& params, const DeviceInfo& device);
/// The plan with this kernel.
Plan choose_plan(const ForwardParams& params, const DeviceInfo& device, const Variant& variant);
/// The plan for a problem whose attn_mask is perhaps causal order or a window, to be launched before that of
/// choose_plan(): it does nothing otherwise. Without a variant: there is none, or it is not worth a launch.
Plan choose_band_plan(const ForwardParams& params, const DeviceInfo& device);
/// The same for a problem whose attn_mask is additive and perhaps adds nothing but 0 to what it shows: a plan for
/// bits_problem().
Plan choose_bits_plan(const ForwardParams& params, const DeviceInfo& device);
/// Whether the problem has what only extended kernels know: attn_mask, a rule of scores beyond a scale, or dropout.
bool is_extended(const ForwardParams& params);
/// All kernels for the problem's head dimensions, extended ones if it needs them.
const Variants& variants_for(const ForwardParams& params);

}  // namespace flash_attn::cuda::sm90::forward
