#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../../../sequence.h"
#include "../../common/clusters.h"
#include "../../common/tiles/groups.h"
#include "../../common/tiles/sequence_blocks.h"
#include "../../common/tiles/visibility.h"
#include "../hopper/tensor_map.h"
#include "../refusals.h"
#include "params.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

// The model. A CTA needs for a tile
//   blocks * block_clocks + tile_clocks,   block_clocks = the products' clocks at full rate / variant.efficiency,
// and a launch needs
//   static tiles      full waves of tiles, and a last one whose tiles may be split,
//   longest first     the mean load of a CTA, but no less than the longest tile; half a short tile of imbalance.
//   clusters          a part of the longest tile, and adding up; if not all run at once, no less than the mean load.
// The kernels' constants were fitted to an H200's times at 512 to 16,384 rows, within 3%; the others measured there:
// benchmarks/experiments/010, 005 and 206.
constexpr double kProductsPerClock = 2048;    // multiply-adds of an SM
constexpr double kCombineClocks = 9000;       // launching combine.h's kernel, and its latency
constexpr double kCombineBytesPerClock = 24;  // an SM's share of L2's bandwidth, partial results written and read
constexpr int kMaxSplits = 8;
constexpr double kStartClocks = 6000;         // of a CTA until its first product
constexpr double kClusterClocks = 1500;       // of parts that are put together by their cluster: latency
constexpr double kClusterBytesPerClock = 16;  // that a CTA gets from the others
constexpr int kSampledTiles = 32;
constexpr double kLeastClocksOfKind = 100'000;  // of choose_band_plan() and choose_bits_plan()

/// Blocks a tile visits, over one head.
struct TileLengths {
  int64_t num_m_blocks;
  double mean, longest;
};

TileLengths tile_lengths(const ForwardParams& p, const Variant& variant) {
  const SequenceInfo info = sequence_info(p, 0);
  TileLengths lengths{ceil_div(p.seqlen_q, variant.block_m), 0, 1};
  const int64_t step = std::max<int64_t>(1, lengths.num_m_blocks / kSampledTiles);
  int64_t samples = 0;
  for (int64_t m_block = lengths.num_m_blocks - 1; m_block >= 0; m_block -= step, ++samples) {
    const int64_t begin = m_block * variant.block_m, end = std::min(begin + variant.block_m, p.seqlen_q);
    const auto blocks_seen = [&](int64_t row_begin) {
      const Range cols = visible_columns(p, info, row_begin, end);
      const int64_t visible = std::min(cols.end, p.seqlen_k) - std::max<int64_t>(cols.begin, 0);
      return static_cast<double>(std::max<int64_t>(1, ceil_div(visible, variant.block_n)));
    };
    // A warpgroup passes over blocks that only others see, which takes half as long as working on them.
    const double blocks = blocks_seen(begin);
    lengths.mean += (blocks + blocks_seen(std::max(begin, end - 64))) / 2;
    lengths.longest = std::max(lengths.longest, blocks);
  }
  lengths.mean /= samples;
  return lengths;
}

struct Cost {
  const Variant& variant;
  double block_clocks;

  explicit Cost(const Variant& v)
      : variant(v),
        block_clocks(double(v.block_m) * v.block_n * (v.head_dim + v.head_dim_v) / kProductsPerClock / v.efficiency) {}

  double tile(double blocks) const { return blocks * block_clocks + variant.tile_clocks; }
  /// Beyond the parts' own tile(): each CTA of a cluster gets its share of the rows from the others.
  double combine_in_cluster(int parts) const {
    const double rows = double(variant.block_m) * (parts - 1) / parts;
    return kClusterClocks + 4 * rows * variant.head_dim_v / kClusterBytesPerClock;
  }
  /// The same of parts that go through memory: writing them, and the launch that adds them up.
  double combine(int64_t parts_per_sm) const {
    const double bytes = 2.0 * 4 * variant.block_m * variant.head_dim_v;
    return kCombineClocks + parts_per_sm * bytes / kCombineBytesPerClock;
  }
};

/// The number of parts for the tiles of the last, partial wave that makes them end first. Sets split_begin, num_splits.
void share_out_waves(int num_sms, const Cost& cost, const TileLengths& lengths, Plan& plan) {
  TileSchedule& schedule = plan.schedule;
  const int64_t waves = schedule.num_tiles / num_sms, rest = schedule.num_tiles % num_sms;
  double best = rest > 0 ? cost.tile(lengths.mean) : 0;
  for (int splits = 2; splits <= kMaxSplits && rest > 0 && splits <= lengths.mean; ++splits) {
    const int64_t rounds = ceil_div(rest * splits, num_sms);
    const double clocks = rounds * cost.tile(std::ceil(lengths.mean / splits)) + cost.combine(rounds);
    if (clocks >= best) continue;
    best = clocks;
    schedule.num_splits = splits;
    schedule.split_begin = static_cast<int>(waves * num_sms);
  }
  plan.clocks = waves * cost.tile(lengths.mean) + best;
}

/// All tiles are split alike when the longest would outlast the mean load.
void share_out_longest_first(int num_sms, const Cost& cost, const TileLengths& lengths, bool can_split, Plan& plan) {
  TileSchedule& schedule = plan.schedule;
  const double tiles_per_sm = double(schedule.num_tiles) / num_sms;
  const double shortest = cost.tile(std::max(1.0, lengths.longest / 8));
  plan.clocks = HUGE_VAL;
  for (int splits = 1; splits <= kMaxSplits; ++splits) {
    if (splits > 1 && (tiles_per_sm * splits > 3 || splits > lengths.longest)) break;
    if (splits > 1 && !can_split) break;
    const double mean_load = tiles_per_sm * splits * cost.tile(lengths.mean / splits);
    const double clocks = std::max(mean_load + shortest / 2, cost.tile(std::ceil(lengths.longest / splits))) +
                          (splits > 1 ? cost.combine(std::ceil(tiles_per_sm * splits)) : 0);
    if (clocks >= 0.9 * plan.clocks) continue;
    plan.clocks = clocks;
    schedule.num_splits = splits;
    schedule.split_begin = splits > 1 ? 0 : schedule.num_tiles;
  }
  plan.dynamic = int64_t{schedule.num_tiles} * schedule.num_splits > num_sms;
}

/// Of a kernel of clusters: all tiles are split. A CTA has one part; clusters that find no room start when others end.
void share_out_clusters(const DeviceInfo& device, const Cost& cost, const TileLengths& lengths, Plan& plan) {
  TileSchedule& schedule = plan.schedule;
  schedule.split_begin = 0;
  plan.clocks = HUGE_VAL;
  for (int parts = 2; parts <= kMostOfCluster && (parts == 2 || parts <= lengths.longest); ++parts) {
    if (!have_slots(parts)) continue;
    double waves = double(schedule.num_tiles) * parts / ctas_in_clusters(device, parts);
    double clocks = cost.tile(std::ceil(lengths.longest / parts)) + cost.combine_in_cluster(parts);
    if (waves > 1) {
      if (schedule.order != TileSchedule::kLongestFirst) waves = std::ceil(waves);
      const double mean = cost.tile(lengths.mean / parts) + cost.combine_in_cluster(parts) + kStartClocks;
      clocks = std::max(clocks, waves * mean);
    }
    if (clocks >= plan.clocks) continue;
    plan.clocks = clocks;
    schedule.num_splits = parts;
  }
}

/// Heads whose K and V together take a share of L2 that grows with their length, but where copies weigh less, at head
/// dim 64: benchmarks/experiments/006.
int64_t heads_per_group(const ForwardParams& p, int64_t l2_bytes) {
  const int64_t bytes_per_key = p.head_dim + p.head_dim_v < 256 ? int64_t{64} << 10 : int64_t{16} << 10;
  const int64_t keys = mean_problem(p).seqlen_k;
  const int64_t bytes = std::min(l2_bytes * 8 / 15, keys * bytes_per_key);
  const int64_t bytes_per_head = 2 * keys * (p.head_dim + p.head_dim_v);
  return std::min(std::max<int64_t>(1, bytes / bytes_per_head) * p.group_size(), p.batch * p.num_heads);
}

/// "d128 192x64" is "wgmma d128 192x64" and what has a word after that.
bool is_named(const Variant& variant, const std::string& name) {
  const std::string full = "wgmma " + name;
  return variant.name == full || std::string(variant.name).rfind(full + " ", 0) == 0;
}

/// What changes scores or P beyond attn_mask.
bool has_rules(const ForwardParams& p) { return p.alibi_slopes != nullptr || p.softcap > 0 || p.dropout_p > 0; }

/// The first of the lists, by rising head dims, that takes the problem's; else the last.
const Variants& first_to_take(const ForwardParams& p, std::initializer_list<const Variants*> lists) {
  for (const Variants* variants : lists) {
    const Variant& first = *variants->begin();
    if (p.head_dim > first.head_dim || p.head_dim_v > first.head_dim_v) continue;
    // Panels of Q beyond head_dim are zeroed once: out must not go through them.
    if (ceil_div(p.head_dim, 64) < ceil_div(first.head_dim, 64) && !first.out_buffer) continue;
    return *variants;
  }
  return **(lists.end() - 1);
}

/// A launch that comes to nothing takes 2 us, and one that adds up parts would not come to nothing.
Plan if_worth_launch(const Plan& plan) { return plan.is_split() || plan.clocks < kLeastClocksOfKind ? Plan{} : plan; }

const char* forced_kernel() {
  const char* const forced = std::getenv("FLASH_ATTN_FORWARD_KERNEL");
  return forced != nullptr && *forced != '\0' ? forced : nullptr;
}

}  // namespace

bool is_extended(const ForwardParams& p) { return p.mask.data != nullptr || p.sinks != nullptr || has_rules(p); }

const Variants& variants_for(const ForwardParams& p) {
  if (is_extended(p)) {
    return first_to_take(p, {&kExtendedD64, &kExtendedD96, &kExtendedD128, &kExtendedD192, &kExtendedD256});
  }
  return first_to_take(p, {&kD64, &kD96, &kD128, &kD192V128, &kD192, &kD256V128, &kD256});
}

Plan choose_plan(const ForwardParams& params, const DeviceInfo& device, const Variant& variant) {
  const TileLengths lengths = tile_lengths(mean_problem(params), variant);
  const Cost cost(variant);
  Plan plan;
  plan.packs_mask =
      params.mask.data != nullptr && (is_read_ahead(params, kLeastSharing) || params.cu_seqlens_k != nullptr);
  plan.variant = &variant;
  TileSchedule& schedule = plan.schedule;
  const int64_t num_m_blocks = ceil_div(params.seqlen_q, variant.block_m);
  schedule.num_m_blocks = Divisor(num_m_blocks);
  schedule.num_heads = Divisor(params.num_heads);
  schedule.queries_per_head = Divisor(params.group_size());
  schedule.alike = params.is_dense();
  if (schedule.alike) schedule.sequence = sequence_info(params, 0);
  // With cu_seqlens_q an upper bound: every sequence may end inside a tile.
  const int64_t num_blocks = SequenceBlocks::of_queries(params, variant.block_m).count();
  schedule.num_tiles = static_cast<int>(params.num_heads * num_blocks);
  schedule.split_begin = INT32_MAX;
  schedule.num_splits = 1;
  if (params.is_varlen_q()) {
    schedule.order = TileSchedule::kPacked;
    plan.dynamic = true;
    plan.clocks = double(schedule.num_tiles) / device.num_sms * cost.tile(lengths.mean);
  } else if (variant.cluster) {
    schedule.order = rows_see_prefixes(params) ? TileSchedule::kLongestFirst : TileSchedule::kRowsFirst;
    set_groups(schedule, heads_per_group(params, device.l2_bytes), params.batch * params.num_heads);
    share_out_clusters(device, cost, lengths, plan);
  } else if (rows_see_prefixes(params) || params.mask.data != nullptr) {
    schedule.order = TileSchedule::kLongestFirst;
    set_groups(schedule, heads_per_group(params, device.l2_bytes), params.batch * params.num_heads);
    // Parts have their maximum in log2, where the smallest float that a bias may be is none any more.
    share_out_longest_first(device.num_sms, cost, lengths, !params.has_bias(), plan);
  } else {
    schedule.order = TileSchedule::kRowsFirst;
    share_out_waves(device.num_sms, cost, lengths, plan);
    // Equal tiles stay in step by themselves; those of a window take unequal time [2 to 10% at windows of 1024, 4096].
    plan.dynamic = params.has_window() && int64_t{schedule.num_tiles} > device.num_sms;
  }
  const int64_t split_tiles = plan.is_split() ? schedule.num_tiles - schedule.split_begin : 0;
  const int64_t items = schedule.num_tiles + split_tiles * (schedule.num_splits - 1);
  plan.grid = static_cast<int>(variant.cluster ? items : std::min<int64_t>(device.num_sms, items));
  if (!plan.is_split()) schedule.split_begin = INT32_MAX;
  return plan;
}

Plan choose_plan(const ForwardParams& params, const DeviceInfo& device) {
  const char* const forced = forced_kernel();
  Plan best;
  for (const Variant& variant : variants_for(params)) {
    if (variant.masked != (params.has_window() || is_extended(params))) continue;
    if (variant.cluster && params.is_varlen_q()) continue;  // how many tiles there are the host does not know
    if (variant.biased != params.has_bias() || (has_rules(params) && !variant.rules)) continue;
    if (variant.staged && !has_mask_map(params)) continue;
    if (forced != nullptr && !is_named(variant, forced)) continue;
    const Plan plan = choose_plan(params, device, variant);
    if (best.variant == nullptr || plan.clocks < best.clocks) best = plan;
  }
  if (best.variant == nullptr) {
    std::string names;
    for (const Variant& variant : variants_for(params)) {
      names += std::string(names.empty() ? "" : ", ") + variant.name;
    }
    throw std::runtime_error("FLASH_ATTN_FORWARD_KERNEL=" + std::string(forced) +
                             " takes no problem of these head dimensions, whose kernels are: " + names);
  }
  return best;
}

Plan choose_band_plan(const ForwardParams& params, const DeviceInfo& device) {
  if (!mask_may_be_band(params) || forced_kernel() != nullptr) return {};
  const ForwardParams p = band_problem(params);
  const Plan plan =
      choose_plan(p, device, *first_to_take(p, {&kBandD64, &kBandD96, &kBandD128, &kBandD192, &kBandD256}).begin());
  return if_worth_launch(plan);
}

Plan choose_bits_plan(const ForwardParams& params, const DeviceInfo& device) {
  if (!mask_may_be_bits(params) || forced_kernel() != nullptr) return {};
  return if_worth_launch(choose_plan(bits_problem(params), device));
}

int64_t place_workspace(Plan& plan, const ForwardParams& params, void* workspace) {
  int64_t bytes = 0;
  const auto place = [&](auto*& pointer, int64_t count) {
    if (workspace != nullptr && count > 0) {
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(static_cast<char*>(workspace) + bytes);
    }
    bytes += ceil_div(count * int64_t(sizeof(*pointer)), 256) * 256;
  };
  TileSchedule& schedule = plan.schedule;
  place(schedule.next_tile, plan.dynamic ? 1 : 0);
  place(schedule.first_m_block, params.is_varlen_q() ? params.batch + 1 : 0);
  const int64_t partial_rows = plan.has_partials() ? int64_t{schedule.num_tiles - schedule.split_begin} *
                                                         schedule.num_splits * plan.variant->block_m
                                                   : 0;
  place(schedule.partial_out, partial_rows * plan.variant->head_dim_v);
  place(schedule.partial_statistics, partial_rows);
  // Under an additive mask that is not packed, tiles of few scores look for rows of V that are not finite in what they
  // have loaded; for others a launch looks at all of V.
  if (params.mask.data != nullptr && (plan.packs_mask || !has_few_scores(params))) {
    if (workspace != nullptr) plan.mask_workspace = static_cast<char*>(workspace) + bytes;
    bytes += plan.packs_mask ? mask::packing_workspace(params.mask) : mask::bad_rows_bytes(params);
    if (plan.depends_on_kind) bytes += mask::kind_workspace(params.mask);
  }
  return bytes;
}

}  // namespace flash_attn::cuda::sm90::forward
