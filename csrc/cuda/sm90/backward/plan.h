// Which backward kernel runs a problem, and how its tiles are shared out.
#pragma once

#include <cuda_runtime_api.h>

#include "../../../kernel.h"
#include "../../../sequence.h"

namespace flash_attn::cuda::sm90::backward {

struct KernelParams;

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
  int map_rows;                     // rows of a box of K or V: of a CTA's share of a tile
  int cluster;                      // CTAs that share a tile
  float accum_factor_bf16 = 1.f;    // what dq_accum holds over dQ, of bf16
  bool dq_warp, descends;           // see Shape, KernelConfig
  bool fused_dq;                    // takes all tiles of a head in one CTA, which is an order too: see Shape
  Launch launch, launch_row_parts;  // without and with Config::kRowParts
};

// Each in its own .cu file, see choose_plan() for the choice.
extern const Variant kD64, kD64Fused, kD96, kD128, kD192V128, kD192, kD256;

/// See DqWriting.
struct DqWritingPlan {
  bool enabled = false, by_last_block = false;
  int lag = 0;
};

struct Plan {
  const Variant* variant = nullptr;
  // See Schedule.
  int num_n_blocks = 0, num_tiles = 0, tiles_at_once = 0, heads_per_group = 1, grouped_heads = 0;
  bool falling = false, wide_groups = false;
  int key_parts = 1;                     // tiles that share out the query heads of a key head, or their rows:
  int row_parts = 1, part_blocks = 0;    // of these, the parts of one head's rows, and the query blocks of each
  int grid = 0;                          // CTAs
  bool ordered_dq = false;               // see dq/turns.h
  bool claims_dq = false;                // see claim_block
  bool zeroes_dq = false;                // dq_accum, before tiles add to it
  bool spread_starts = false;            // see first_block_of_tile
  bool dynamic = false;                  // CTAs take tiles from a common counter
  int num_blocks = 0, num_m_blocks = 0;  // see KernelParams
  // Of packed sequences: no more blocks of keys than these; see PackedBlocksParams::last_blocks.
  int max_packed_blocks = 0, last_packed_blocks = 0;
  DqWritingPlan dq_writing;
  // By a launch of their own, see RowsParams; the others see RowPreparation.
  int64_t prepared_heads = 0, prepared_tiles = 0;
  int prepared_ahead = 0;  // RowPreparation::ahead; 0: none
};

/// Gradients of a key head that its parts store, see Config::kRowParts.
inline int stored_parts(const Plan& plan) { return plan.row_parts > 1 ? 2 * plan.key_parts : plan.key_parts; }

/// The kernel for the problem's head dimensions that takes every problem.
const Variant& variant_for(const ForwardParams& params);
Plan choose_plan(const BackwardParams& params, const DeviceInfo& device);
Plan choose_plan(const BackwardParams& params, const DeviceInfo& device, const Variant& variant);

// In launch.cpp: how much workspace the plan needs, and all launches.
int64_t workspace_bytes(const Plan& plan, const BackwardParams& params);
void launch_plan(const Plan& plan, const BackwardParams& params, cudaStream_t stream);

}  // namespace flash_attn::cuda::sm90::backward
