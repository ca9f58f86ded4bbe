// Which backward kernel runs a problem, and how its tiles are shared out.
#pragma once

#include <cuda_runtime_api.h>

#include "../../../kernel.h"
#include "../../../sequence.h"
#include "dq/protocol.h"

namespace flash_attn::cuda::sm90::backward {

struct KernelParams;
struct Forced;

/// What launches a kernel, for each dtype.
struct Launch {
  void (*bf16)(const KernelParams&, int grid, cudaStream_t);
  void (*fp16)(const KernelParams&, int grid, cudaStream_t);
};

/// One kernel, as compiled for bf16 and fp16.
struct Variant {
  const char* name;
  int head_dim, head_dim_v;  // the largest it takes
  int dq_columns;            // of dq_accum: whole panels of 64
  int block_m, block_n;
  int map_rows;                   // rows of a box of K or V: of a CTA's share of a tile
  int cluster;                    // CTAs that share a tile
  float accum_factor_bf16 = 1.f;  // what dq_accum holds over dQ, of bf16
  DqPath dq_path;
  bool descends;                    // see KernelConfig
  bool extended;                    // takes every rule for scores
  bool takes_bias;                  // of those: also an additive attn_mask
  bool many_registers;              // see ExtendedConfig::kManyRegisters
  Launch launch, launch_row_parts;  // without and with Config::kRowParts
};

// Each in its own .cu file, see choose_plan() for the choice.
extern const Variant kD64, kD64Fused, kD96, kD128, kD192V128, kD192, kD256;
extern const Variant kD64Extended, kD96Extended, kD128Extended, kD192Extended, kD256Extended;
extern const Variant kD64Biased, kD192Dmask, kD256Dmask;  // extended too
extern const Variant kD64Band, kD96Band, kD128Band, kD192Band, kD256Band;

/// How the work on a key head is split, see HeadSplit.
struct SplitPlan {
  int head_parts = 1;   // of the query heads that read it
  int row_parts = 1;    // of each one's rows, if all of them are parts
  int part_blocks = 0;  // query blocks of a part: all without row_parts
  int parts() const { return head_parts * row_parts; }
  /// Gradients of dk and dv that a key head's parts store, see Config::kRowParts.
  int stored() const { return row_parts > 1 ? 2 * parts() : parts(); }
};

/// The order of tiles, see Schedule.
struct OrderPlan {
  int num_n_blocks = 0, num_tiles = 0, tiles_at_once = 0, heads_per_group = 1, grouped_heads = 0;
  bool falling = false, wide_groups = false;
  // Of packed sequences: no more blocks of keys than these; see PackedBlocksParams::last_blocks.
  int max_packed_blocks = 0, last_packed_blocks = 0;
};

/// See DqWriting.
struct DqWritingPlan {
  bool enabled = false, by_last_block = false;
  int lag = 0;
};

struct DqPlan {
  DqProtocol protocol = DqProtocol::kUnshared;
  bool spread_starts = false;  // see first_block_of_tile
  DqWritingPlan writing;
  bool has_turns() const { return protocol == DqProtocol::kFirstStores || protocol == DqProtocol::kOrdered; }
  bool is_ordered() const { return protocol == DqProtocol::kOrdered; }
};

/// What a launch of its own prepares, see RowsParams; tiles prepare the others, see RowPreparation.
struct PreparationPlan {
  int64_t heads = 0, tiles = 0;
  int ahead = 0;  // RowPreparation::ahead; 0: tiles prepare none
};

/// What a problem with more than scale * q.k asks for beside, see extended/params.h.
struct ExtendedPlan {
  bool packs_mask = false;  // reads attn_mask once before, see packed_mask.h
  bool bias_by_tma = false;
  bool stores_dmask = false;    // the tiles do
  bool adds_dmask = false;      // one after the other
  bool computes_dmask = false;  // another launch does
  int64_t dmask_bytes = 0;      // of scratch memory for that
};

struct Plan {
  const Variant* variant = nullptr;
  int num_blocks = 0, num_m_blocks = 0;  // see KernelParams
  SplitPlan split;
  OrderPlan order;
  DqPlan dq;
  PreparationPlan preparation;
  ExtendedPlan extended;
  int grid = 0;          // CTAs
  bool dynamic = false;  // that take tiles from a common counter
};

/// Whether scores are more than scale * q.k, or attn_mask hides some.
bool is_extended(const ForwardParams& params);
/// The kernel for the problem's head dimensions that takes every problem like it.
const Variant& extended_variant_for(const BackwardParams& params);
/// What is left to decide when the order of tiles and the way of dq are.
ExtendedPlan plan_extended(const Plan& plan, const BackwardParams& params, const DeviceInfo& device);
/// Why that kernel does not take an additive attn_mask, as a clause; null if it does.
const char* refuses_bias(const ForwardParams& params);
/// The kernel for the problem's head dimensions that takes every problem with is_extended() false.
const Variant& variant_for(const ForwardParams& params);
/// The plan for a problem whose attn_mask is perhaps causal order or a window, by a kernel that does nothing otherwise.
/// Without a variant: there is none, or it is not worth its launches.
Plan choose_band_plan(const BackwardParams& params, const DeviceInfo& device);
/// The same where attn_mask is additive and perhaps only hides: a plan for bits_problem().
Plan choose_bits_plan(const BackwardParams& params, const DeviceInfo& device);
/// The plan; what FLASH_ATTN_BACKWARD_PLAN asks for, or std::runtime_error if the problem does not take it.
Plan choose_plan(const BackwardParams& params, const DeviceInfo& device);
/// With this kernel.
Plan choose_plan(const BackwardParams& params, const DeviceInfo& device, const Variant& variant, const Forced& forced);

}  // namespace flash_attn::cuda::sm90::backward
