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

/// Blocks that an SM holds.
int blocks_per_sm(const BackwardVariant& variant, const DeviceInfo& device) {
  return std::min(variant.blocks_per_sm, (device.shared_memory_per_block + kReservedBytes) /
                                             (variant.shared_bytes + kStaticSharedBytes + kReservedBytes));
}

int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

/// Blocks of query rows that see a tile's keys, over a head's tiles: on average, and at most.
struct TileSteps {
  double mean = 0, longest = 1;
};

TileSteps tile_steps(const ForwardParams& p, int64_t block_m, int64_t block_n) {
  constexpr int64_t kSamples = 16;
  const SequenceInfo info = sequence_info(p, 0);
  const int64_t n_blocks = std::max<int64_t>(1, ceil_div(p.seqlen_k, block_n));
  const int64_t step = p.window_left < 0 && p.window_right < 0 ? n_blocks : std::max<int64_t>(1, n_blocks / kSamples);
  TileSteps steps;
  int samples = 0;
  for (int64_t n = 0; n < n_blocks; n += step, ++samples) {
    const Range rows = visible_rows(p, info, n * block_n, std::min((n + 1) * block_n, p.seqlen_k));
    const double blocks =
        rows.empty() ? 0 : double(ceil_div(std::min(rows.end, p.seqlen_q), block_m) - rows.begin / block_m);
    steps.mean += blocks;
    steps.longest = std::max(steps.longest, blocks);
  }
  steps.mean /= samples;
  return steps;
}

// Clocks of an SM: benchmarks/experiments/160.
constexpr double kSumClocks = 8000;       // launching the kernel that adds up parts, and its latency
constexpr double kSumBytesPerClock = 32;  // of parts written and read, beside other work
constexpr double kWorthwhile = 0.95;      // of the time with fewer parts
constexpr int kMaxParts = 16;

/// How long an SM that holds `at_a_time` blocks takes for `blocks`, in times that it takes for each of `full` blocks.
/// With fewer than these each goes on faster, but only by a quarter of what the others leave.
double times_of_block(double blocks, int at_a_time, int full) {
  const double rounds = std::floor(blocks / at_a_time), left = blocks - rounds * at_a_time;
  return rounds * (at_a_time + 3 * full) / 4 + (left > 0 ? (left + 3 * full) / 4 : 0);
}

/// In how many parts the query rows of a tile are shared out so that all of the GPU has something to do. Returns how
/// many clocks the tiles take.
double choose_parts(const BackwardParams& params, const DeviceInfo& device, BackwardPlan& plan) {
  const ForwardParams& p = params.forward;
  const BackwardVariant& variant = *plan.variant;
  const int at_a_time = blocks_per_sm(variant, device);
  const bool may_part = p.is_dense() && !plan.ordered && params.dslopes == nullptr &&
                        plan.num_tiles < int64_t{4} * device.num_sms * at_a_time;
  const TileSteps steps = tile_steps(mean_problem(p), variant.block_m, variant.block_n);
  const double step_clocks =
      5.0 * variant.block_m * variant.block_n * variant.head_dim * double(p.group_size()) / variant.clocks.products;
  const auto takes = [&](double count) { return count * step_clocks + variant.clocks.start; };
  double best = 0;
  for (int n = 1; n <= (may_part ? kMaxParts : 1) && n <= steps.longest; ++n) {
    const double per_sm = double(plan.num_tiles) * n / device.num_sms, longest = takes(std::ceil(steps.longest / n));
    const double alone = longest * times_of_block(1, at_a_time, variant.blocks_per_sm);
    double clocks = times_of_block(std::ceil(per_sm), at_a_time, variant.blocks_per_sm);
    if (steps.mean == steps.longest) {
      clocks *= longest;
    } else if (plan.num_tiles == plan.num_n_blocks) {  // of one head, whose longest tiles come first
      clocks = std::max(per_sm * takes(steps.mean / n), alone);
    } else {  // others end while the last head's longest tile is under way
      clocks = std::max(clocks * takes(steps.mean / n) + alone / 2, alone);
    }
    if (n > 1) clocks += kSumClocks + per_sm * 16.0 * variant.block_n * variant.head_dim / kSumBytesPerClock;
    if (n > 1 && clocks >= kWorthwhile * best) continue;
    best = clocks;
    plan.parts = n;
  }
  return best;
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

/// How the variant runs the problem; returns how many clocks its tiles take.
double lay_out(const BackwardParams& params, const DeviceInfo& device, BackwardPlan& plan) {
  const ForwardParams& p = params.forward;
  const int64_t m = plan.variant->block_m, n = plan.variant->block_n;
  plan.num_m_blocks = p.is_varlen_q() ? p.total_q / m + p.batch : ceil_div(p.seqlen_q, m);
  plan.num_n_blocks = p.is_varlen_k() ? p.total_k / n + p.batch : ceil_div(p.seqlen_k, n);
  plan.num_row_blocks = plan.num_m_blocks * p.num_heads * (p.is_varlen_q() ? 1 : p.batch);
  plan.num_tiles = plan.num_n_blocks * p.num_heads_k * (p.is_varlen_k() ? 1 : p.batch);
  plan.ordered = p.deterministic && params.dq.data != nullptr;
  if (plan.ordered && p.is_dense() && !p.has_window()) {
    // Those of a group wait for each other and have to run at a time: half of what the GPU holds, whatever else runs.
    // Where other heads fill the GPU, no two of them begin with the same query rows.
    const int64_t at_a_time = std::max(1, device.num_sms * blocks_per_sm(*plan.variant, device) / 2);
    const bool filled = p.batch * p.num_heads_k * plan.num_m_blocks >= 4 * at_a_time;
    const int64_t most = filled ? std::min(at_a_time, plan.num_m_blocks) : at_a_time;
    plan.spread = int(ceil_div(plan.num_n_blocks, ceil_div(plan.num_n_blocks, most)));
  }
  plan.share_rows = choose_share_rows(plan, device);
  return choose_parts(params, device, plan);
}

}  // namespace

BackwardPlan plan_backward(const BackwardParams& params, const DeviceInfo& device) {
  const ForwardParams& p = params.forward;
  const ForcedKernel forced("FLASH_ATTN_BACKWARD_KERNEL", false);
  const unsigned gpus = gpus_of_code(10 * code_arch(device.compute_capability, FLASH_ATTN_SM80_ARCHS));
  BackwardPlan plan;
  plan.aligned = is_aligned(params);
  const Rules rules = rules_of(p, plan.aligned);
  BackwardPlan chosen;
  double best = 0;
  // Of the smallest head dim that has any, the one whose tiles take the least time. With the gradient of attn_mask a
  // head dim needs a kernel for that too.
  for (const BackwardVariants* variants : kVariants) {
    for (const BackwardVariant& variant : *variants) {
      if (!takes(variant, p, rules) || (variant.gpus & gpus) == 0 || !forced.allows(variant.name)) continue;
      if (variant.shared_bytes + kStaticSharedBytes > device.shared_memory_per_block) continue;
      BackwardPlan fitting = plan;
      fitting.variant = &variant;
      fitting.adds_mask_gradient = variant.rules == Rules::kBias && may_add_mask_gradient(params);
      if (params.dmask != nullptr && !fitting.adds_mask_gradient) fitting.mask_gradient = &variants->mask_gradient;
      const double clocks = lay_out(params, device, fitting);
      if (chosen.variant != nullptr && clocks >= best) continue;
      chosen = fitting;
      best = clocks;
    }
    if (chosen.variant != nullptr) break;
  }
  if (chosen.variant == nullptr) {
    forced.require([&](const auto& visit) {
      for (const BackwardVariants* variants : kVariants) {
        for (const BackwardVariant& variant : *variants) {
          if (takes(variant, p, rules)) visit(variant.name);
        }
      }
    });
    return chosen;
  }
  chosen.packs_mask = packs_mask(p);
  lay_out_workspace(chosen, params);
  return chosen;
}

}  // namespace flash_attn::cuda::sm80
