#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../../../sequence.h"
#include "../code.h"
#include "../forced_kernel.h"
#include "../refusals.h"
#include "schedule/schedule.h"

namespace flash_attn::cuda::sm80 {
namespace {

constexpr int kReservedBytes = 1024;  // of shared memory, a block, by the system
constexpr int kStaticBytes = 384;     // of shared memory, a block, beside the tiles
constexpr int kMaxSeenWords = 1024;   // 8 KB: of 65,536 columns

/// By rising head dims.
const ForwardVariants* const kVariants[] = {&kForwardD32,  &kForwardD64,  &kForwardD96, &kForwardD128,
                                            &kForwardD192, &kForwardD256, &kForwardD512};

/// Whether the variant's tiles hold the problem's columns, and its rules are the problem's.
bool takes(const ForwardVariant& variant, const ForwardParams& p, Rules rules) {
  return serves(variant.rules, rules) && std::max(p.head_dim, p.head_dim_v) <= variant.head_dim;
}

/// Whether an SM holds a block of the variant; with how much of the mask, and how many of them.
bool fit(const ForwardVariant& variant, const ForwardParams& p, const DeviceInfo& device, ForwardPlan& plan) {
  const int bytes = variant.tile_bytes + kStaticBytes;
  if (bytes > device.shared_memory_per_block) return false;
  if (plan.packs_mask) {
    const int64_t words = std::min<int64_t>(kMaxSeenWords, ceil_div(p.seqlen_k, 64));
    plan.seen_words = int(std::min<int64_t>(words, (device.shared_memory_per_block - bytes) / 8));
    if ((variant.rules == Rules::kMask || variant.rules == Rules::kBias) && plan.seen_words < ceil_div(p.seqlen_k, 64))
      return false;
  }
  plan.blocks_per_sm = std::min(variant.blocks_per_sm, (device.shared_memory_per_block + kReservedBytes) /
                                                           (bytes + 8 * plan.seen_words + kReservedBytes));
  return true;
}

/// Heads whose K and V together take about half of L2: their tiles follow each other.
int heads_per_group(const ForwardParams& p, int64_t l2_bytes) {
  const int64_t bytes_per_head = 2 * p.seqlen_k * (p.head_dim + p.head_dim_v);
  const int64_t kv_heads = std::max<int64_t>(1, l2_bytes / 2 / std::max<int64_t>(1, bytes_per_head));
  return int(std::min(kv_heads * p.group_size(), p.batch * p.num_heads));
}

/// Blocks of keys that a tile visits, over a head: on average, and at most.
struct TileLengths {
  double mean = 0, longest = 1;
};

TileLengths tile_lengths(const ForwardParams& p, int64_t block_m, int64_t block_n) {
  constexpr int64_t kSamples = 32;
  const SequenceInfo info = sequence_info(p, 0);
  const int64_t m_blocks = std::max<int64_t>(1, ceil_div(p.seqlen_q, block_m));
  const int64_t step = std::max<int64_t>(1, m_blocks / kSamples);
  TileLengths lengths;
  int samples = 0;
  for (int64_t m = m_blocks - 1; m >= 0; m -= step, ++samples) {
    const Range cols =
        visible_columns(p, info, m * block_m, std::max(m * block_m + 1, std::min((m + 1) * block_m, p.seqlen_q)));
    const double blocks = double(std::max<int64_t>(
        1, ceil_div(std::min(cols.end, p.seqlen_k), block_n) - std::max<int64_t>(cols.begin, 0) / block_n));
    lengths.mean += blocks;
    lengths.longest = std::max(lengths.longest, blocks);
  }
  lengths.mean /= samples;
  return lengths;
}

// Clocks of an SM: benchmarks/experiments/088 and 143.
constexpr double kAlone = 0.7;  // a block that is alone takes longer than its share by this times those that fit
constexpr double kCombineClocks = 9000;       // launching combine's kernel, and its latency
constexpr double kCombineBytesPerClock = 16;  // an SM's share of L2's bandwidth, partial results written and read
constexpr int kMaxSplits = 16;

/// Into how many parts the keys of each tile are cut so that all of the GPU has something to do, and what all takes.
struct Division {
  int splits = 1;
  double clocks = 0;
};

Division divide(const ForwardParams& p, const DeviceInfo& device, const ForwardPlan& plan) {
  const ForwardVariant& variant = *plan.variant;
  const double tiles = double(plan.schedule.num_tiles);
  const bool can_split = !p.is_varlen_q() && p.sinks == nullptr && variant.rules != Rules::kExtended &&
                         variant.rules != Rules::kBias &&
                         plan.schedule.num_tiles < int64_t{2} * device.num_sms * plan.blocks_per_sm;
  const TileLengths lengths = tile_lengths(mean_problem(p), variant.block_m, variant.block_n);
  const double block_clocks =
      double(variant.block_m) * variant.block_n * 2 * variant.head_dim / variant.clocks.products;
  const double alone = std::max(1.0, kAlone * variant.blocks_per_sm),
               slower = std::max(1.0, alone / plan.blocks_per_sm);
  const auto takes = [&](double blocks) { return blocks * block_clocks + variant.clocks.start; };
  Division best;
  for (int n = 1; n <= (can_split ? kMaxSplits : 1) && n <= lengths.longest; ++n) {
    const double per_sm = tiles * n / device.num_sms;
    double clocks = std::max(per_sm * slower * takes(lengths.mean / n), alone * takes(std::ceil(lengths.longest / n)));
    if (lengths.longest == lengths.mean) {
      clocks = std::max(std::ceil(per_sm) * slower, alone) * takes(std::ceil(lengths.longest / n));
    }
    if (n > 1) clocks += kCombineClocks + per_sm * 8.0 * variant.block_m * variant.head_dim / kCombineBytesPerClock;
    if (n > 1 && clocks >= 0.95 * best.clocks) continue;
    best = {n, clocks};
  }
  best.clocks += variant.clocks.cold;
  return best;
}

/// Returns how many clocks all takes.
double lay_out_tiles(const ForwardParams& p, const DeviceInfo& device, ForwardPlan& plan) {
  const ForwardVariant& variant = *plan.variant;
  TileSchedule& schedule = plan.schedule;
  schedule = make_schedule(p, variant.block_m, heads_per_group(p, device.l2_bytes));
  const Division division = divide(p, device, plan);
  schedule.num_splits = division.splits;
  schedule.split_begin = plan.is_split() ? 0 : INT32_MAX;
  if (plan.is_split()) {
    const int64_t rows = plan.num_blocks() * variant.block_m;
    plan.partial_out = ceil_div(plan.workspace_bytes, 256) * 256;
    plan.partial_out_bytes = rows * variant.head_dim * 4;
    plan.workspace_bytes = plan.partial_out + plan.partial_out_bytes + rows * 8;
  }
  return division.clocks;
}

}  // namespace

bool is_extended(const ForwardParams& p) { return !(p.softmax_scale > 0.0) || rules_of(p, true) != Rules::kPlain; }

Rules forward_rules(const ForwardParams& p) {
  // Others look for the largest q.k before they scale it, which a factor below 0 makes the smallest.
  return p.softmax_scale > 0.0 ? rules_of(p, is_aligned(p)) : Rules::kExtended;
}

bool is_aligned(const ForwardParams& p) {
  const auto whole = [](const TensorView& view) {
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.batch % 8 == 0 && view.row % 8 == 0 &&
           view.head % 8 == 0;
  };
  return p.head_dim % 8 == 0 && p.head_dim_v % 8 == 0 && whole(p.q) && whole(p.k) && whole(p.v) && whole(p.out);
}

ForwardPlan plan_forward(const ForwardParams& p, const DeviceInfo& device) {
  const ForcedKernel forced("FLASH_ATTN_FORWARD_KERNEL", true);
  ForwardPlan plan;
  plan.aligned = is_aligned(p);
  const Rules rules = forward_rules(p);
  plan.packs_mask = packs_mask(p);
  if (plan.packs_mask) {
    plan.workspace_bytes = mask::packing_workspace(p.mask);
  }
  const unsigned gpus = gpus_of_code(10 * code_arch(device.compute_capability, FLASH_ATTN_SM80_ARCHS));
  ForwardPlan chosen;
  double best = 0;
  // Of the smallest head dim that has any.
  for (const ForwardVariants* variants : kVariants) {
    for (const ForwardVariant& variant : *variants) {
      if (!takes(variant, p, rules) || (variant.gpus & gpus) == 0) continue;
      if (!forced.allows(variant.name)) continue;
      ForwardPlan fitting = plan;
      if (!fit(variant, p, device, fitting)) continue;
      fitting.variant = &variant;
      const double clocks = lay_out_tiles(p, device, fitting);
      if (chosen.variant != nullptr && clocks >= best) continue;
      chosen = fitting;
      best = clocks;
    }
    if (chosen.variant != nullptr) return chosen;
  }
  forced.require([&](const auto& visit) {
    for (const ForwardVariants* variants : kVariants) {
      for (const ForwardVariant& variant : *variants) {
        if (takes(variant, p, rules)) visit(variant.name);
      }
    }
  });
  return chosen;
}

}  // namespace flash_attn::cuda::sm80
