#include "plan.h"

#include <algorithm>
#include <cmath>

#include "../../../sequence.h"
#include "../code.h"
#include "../forced_kernel.h"
#include "../refusals.h"

namespace flash_attn::cuda::sm80 {
namespace {

constexpr int kStaticSharedBytes = 128;  // of a block, beside the tiles
constexpr int kReservedBytes = 1024;     // of shared memory, a block, by the system
constexpr int64_t kAlignment = 256;

/// By rising head dims.
const BackwardVariants* const kVariants[] = {&kBackwardD32,  &kBackwardD64,  &kBackwardD96, &kBackwardD128,
                                             &kBackwardD192, &kBackwardD256, &kBackwardD512};

bool is_aligned(const BackwardParams& params) {
  const auto whole = [](const TensorView& view) {
    return view.data == nullptr || (reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.batch % 8 == 0 &&
                                    view.row % 8 == 0 && view.head % 8 == 0);
  };
  const ForwardParams& p = params.forward;
  return p.head_dim % 8 == 0 && p.head_dim_v % 8 == 0 && whole(p.q) && whole(p.k) && whole(p.v) && whole(p.out) &&
         whole(params.dout) && whole(params.dq) && whole(params.dk) && whole(params.dv);
}

/// Whether dS may be added to the gradient of attn_mask as it comes: in an order that is not fixed, and with a number
/// for each score of a head.
bool may_add_mask_gradient(const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  return params.dmask != nullptr && !p.deterministic && p.mask.row_size == p.seqlen_q && p.mask.col_size == p.seqlen_k;
}

/// Whether the variant's tiles hold the problem's columns, and its rules are the problem's.
bool takes(const BackwardVariant& variant, const ForwardParams& p, Rules rules) {
  return std::max(p.head_dim, p.head_dim_v) <= variant.head_dim && serves(variant.rules, rules);
}

/// The first that fits, of the smallest head dim that has any. With the gradient of attn_mask a head dim needs a kernel
/// for that too.
void choose_variant(const BackwardParams& params, const DeviceInfo& device, BackwardPlan& plan) {
  const ForwardParams& p = params.forward;
  const ForcedKernel forced("FLASH_ATTN_BACKWARD_KERNEL", false);
  const unsigned gpus = gpus_of_code(10 * code_arch(device.compute_capability, FLASH_ATTN_SM80_ARCHS));
  const Rules rules = rules_of(p, plan.aligned);
  for (const BackwardVariants* variants : kVariants) {
    for (const BackwardVariant& variant : *variants) {
      const int bytes = variant.shared_bytes + kStaticSharedBytes;
      if (!takes(variant, p, rules) || (variant.gpus & gpus) == 0 || !forced.allows(variant.name)) continue;
      if (bytes > device.shared_memory_per_block) continue;
      plan.variant = &variant;
      plan.adds_mask_gradient = variant.rules == Rules::kBias && may_add_mask_gradient(params);
      if (params.dmask != nullptr && !plan.adds_mask_gradient) plan.mask_gradient = &variants->mask_gradient;
      return;
    }
  }
  forced.require([&](const auto& visit) {
    for (const BackwardVariants* variants : kVariants) {
      for (const BackwardVariant& variant : *variants) {
        if (takes(variant, p, rules)) visit(variant.name);
      }
    }
  });
}

/// Blocks that an SM holds.
int blocks_per_sm(const BackwardVariant& variant, const DeviceInfo& device) {
  return std::min(variant.blocks_per_sm, (device.shared_memory_per_block + kReservedBytes) /
                                             (variant.shared_bytes + kStaticSharedBytes + kReservedBytes));
}

int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

// Clocks of an SM, for few tiles: benchmarks/experiments/089.
constexpr double kProductsPerClock = 600;  // multiply-adds
constexpr double kTileClocks = 6000;       // of a block beside its products
constexpr double kSumClocks = 8000;        // launching the kernel that adds up parts, and its latency
constexpr int kMaxParts = 16;

/// In how many parts the query rows of a tile are shared out so that all of the GPU has something to do.
int choose_parts(const BackwardParams& params, const BackwardPlan& plan, const DeviceInfo& device) {
  const ForwardParams& p = params.forward;
  if (!p.is_dense() || plan.ordered || params.dslopes != nullptr || plan.num_tiles >= device.num_sms) return 1;
  const BackwardVariant& variant = *plan.variant;
  const double step_clocks = 5.0 * variant.block_m * variant.block_n * variant.head_dim / kProductsPerClock;
  double best = 0;
  int parts = 1;
  for (int n = 1; n <= kMaxParts && n <= plan.num_m_blocks; ++n) {
    const double per_sm = std::ceil(double(plan.num_tiles) * n / device.num_sms);
    const double steps = double(ceil_div(plan.num_m_blocks, n)) * double(p.group_size());
    const double clocks = per_sm * (steps * step_clocks + kTileClocks) + (n > 1 ? kSumClocks : 0);
    if (n > 1 && clocks >= 0.95 * best) continue;
    best = clocks;
    parts = n;
  }
  return parts;
}

/// Rows of a block of query rows that a thread block has before and after the kernel on tiles: all, unless the chip has
/// room for more blocks.
int choose_share_rows(const BackwardPlan& plan, const DeviceInfo& device) {
  constexpr int kLeast = 16, kBlocksPerSm = 4;
  int rows = plan.variant->block_m;
  for (int64_t blocks = plan.num_row_blocks; rows > kLeast && blocks < int64_t{kBlocksPerSm} * device.num_sms;
       blocks *= 2)
    rows /= 2;
  return rows;
}

void lay_out_workspace(BackwardPlan& plan, const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  const BackwardVariant& variant = *plan.variant;
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t start = end;
    end += aligned(bytes);
    return start;
  };
  const int64_t blocks = plan.num_row_blocks, rows = blocks * variant.block_m;
  take(params.dq.data != nullptr ? rows * variant.head_dim * 4 : 0);
  plan.minus_lse = take(rows * 4);
  plan.minus_delta = take(rows * 4);
  plan.turns = take(plan.ordered ? blocks * variant.warps * 4 : 0);
  plan.next_tile = take(plan.ordered ? 4 : 0);
  const int64_t key_blocks = plan.num_n_blocks * p.num_heads * (p.is_varlen_k() ? 1 : p.batch);
  plan.slope_sums = take(params.dslopes != nullptr ? key_blocks * variant.warps * 4 : 0);
  plan.packed_mask = take(plan.packs_mask ? mask::packing_workspace(p.mask) : 0);
  const int64_t sums = plan.parts > 1 ? plan.num_tiles * plan.parts * variant.block_n * variant.head_dim * 4 : 0;
  plan.dk_parts = take(sums);
  plan.dv_parts = take(sums);
  plan.workspace_bytes = end;
}

}  // namespace

BackwardPlan plan_backward(const BackwardParams& params, const DeviceInfo& device) {
  const ForwardParams& p = params.forward;
  BackwardPlan plan;
  plan.aligned = is_aligned(params);
  choose_variant(params, device, plan);
  if (plan.variant == nullptr) return plan;
  const int64_t m = plan.variant->block_m, n = plan.variant->block_n;
  plan.num_m_blocks = p.is_varlen_q() ? p.total_q / m + p.batch : ceil_div(p.seqlen_q, m);
  plan.num_n_blocks = p.is_varlen_k() ? p.total_k / n + p.batch : ceil_div(p.seqlen_k, n);
  plan.num_row_blocks = plan.num_m_blocks * p.num_heads * (p.is_varlen_q() ? 1 : p.batch);
  plan.num_tiles = plan.num_n_blocks * p.num_heads_k * (p.is_varlen_k() ? 1 : p.batch);
  plan.ordered = p.deterministic && params.dq.data != nullptr;
  if (plan.ordered && p.is_dense() && !p.has_window()) {
    // Those of a group wait for each other and have to run at a time: half of what the GPU holds, whatever else runs.
    const int64_t at_a_time = std::max(1, device.num_sms * blocks_per_sm(*plan.variant, device) / 2);
    plan.spread = int(ceil_div(plan.num_n_blocks, ceil_div(plan.num_n_blocks, at_a_time)));
  }
  plan.share_rows = choose_share_rows(plan, device);
  plan.parts = choose_parts(params, plan, device);
  plan.packs_mask = packs_mask(p);
  lay_out_workspace(plan, params);
  return plan;
}

}  // namespace flash_attn::cuda::sm80
