#include "plan.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../../common/tiles/sequence_blocks.h"
#include "../../common/tiles/visibility.h"
#include "../refusals.h"
#include "forced.h"
#include "params.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

/// Heads of k over all batches, each counted once for each part.
int64_t num_batch_heads(const Plan& plan, const ForwardParams& p) {
  return p.batch * p.num_heads_k * plan.split.parts();
}

int64_t num_tiles(const Plan& plan, const ForwardParams& p) {
  const int64_t blocks = p.is_varlen_k() ? plan.order.max_packed_blocks : p.batch * plan.order.num_n_blocks;
  return p.num_heads_k * plan.split.parts() * blocks;
}

// Of is_balanced(): how full the last wave of equal tiles has to be, and how many tiles of different lengths an SM
// needs.
constexpr int64_t kLeastFullPercent = 90;
constexpr double kTilesPerSm = 8, kPairsPerSm = 3.5;

/// Whether the tiles' shares of the work come out even. With tiles of one length that is a matter of whole waves. Of
/// different lengths there have to be several an SM: eight, or half as many in pairs, which lose more by parts of dk
/// and dv that have to be added up, unless each waits for its turn: benchmarks/experiments/049.
bool is_balanced(const Plan& plan, const ForwardParams& p) {
  const int64_t tiles = num_tiles(plan, p), at_once = plan.order.tiles_at_once;
  if (!rows_see_prefixes(p)) return 100 * tiles >= kLeastFullPercent * at_once * ceil_div(tiles, at_once);
  const bool few_do = plan.variant->cluster > 1 && !p.deterministic;
  return tiles >= (few_do ? kPairsPerSm : kTilesPerSm) * at_once;
}

/// The fewest parts of the query heads of a key head that make the work even; all of them if none does.
int head_parts(const Plan& plan, const ForwardParams& p, const Forced& forced) {
  Plan tried = plan;
  const int group = static_cast<int>(p.group_size());
  for (tried.split.head_parts = 1; tried.split.head_parts < group; ++tried.split.head_parts) {
    if (group % tried.split.head_parts != 0) continue;
    if (forced.row_parts > 1) continue;  // each part has one head then
    if (forced.head_parts > 0 ? tried.split.head_parts >= forced.head_parts : is_balanced(tried, p)) break;
  }
  return tried.split.head_parts;
}

/// Tiles that see something, if each has so many query blocks of one head: without a mask all, in causal attention
/// about half.
int64_t num_seeing_tiles(const Plan& plan, const ForwardParams& params, int64_t blocks) {
  const ForwardParams p = mean_problem(params);
  return num_batch_heads(plan, p) * num_visible_tiles(p, blocks * plan.variant->block_m, plan.variant->block_n);
}

// Of part_blocks(): rows that parts have to spare a tile, the second where dk and dv come in parts anyway; from how
// many rows on causal attention has two parts at least.
constexpr int64_t kLeastSavedRows = 512, kLeastSavedRowsOfParts = 384, kRowsOfTwoParts = 2048;

/// How many query blocks a tile has where there are fewer tiles than SMs: so few that all SMs work and all tiles that
/// see something can run at once; or half of a head's in causal attention, if they are many. It has to save so many
/// rows that adding up the parts is worth it: benchmarks/experiments/052.
int64_t part_blocks(const Plan& plan, const ForwardParams& p, const Forced& forced) {
  const int64_t tiles = num_tiles(plan, p), at_once = plan.order.tiles_at_once, all = plan.num_m_blocks;
  if (p.is_varlen_k() || (p.has_window() && !rows_see_prefixes(p))) return all;
  const auto blocks_of_parts = [&](int64_t parts) {
    return ceil_div(ceil_div(all, parts), 2) * 2;  // where the order is fixed a turn may be for two
  };
  if (forced.row_parts > 0) return forced.row_parts == 1 ? all : std::min(all, blocks_of_parts(forced.row_parts));
  if (tiles > at_once) return all;
  int64_t parts = at_once / tiles;
  while (parts < all && num_seeing_tiles(plan, p, blocks_of_parts(parts + 1)) <= at_once) ++parts;
  if (rows_see_prefixes(p) && p.seqlen_q >= kRowsOfTwoParts) parts = std::max<int64_t>(parts, 2);
  const bool adds_parts_anyway = plan.split.parts() > 1 && plan.variant->cluster == 1;
  const int64_t blocks = blocks_of_parts(parts), saved_rows = (all - blocks) * plan.variant->block_m;
  return saved_rows >= (adds_parts_anyway ? kLeastSavedRowsOfParts : kLeastSavedRows) ? blocks : all;
}

/// Heads whose Q, dO and dQ together take a share of L2 that grows with their length, up to half of it.
int64_t heads_in_l2(const Plan& plan, const ForwardParams& p, int64_t l2_bytes) {
  const int64_t rows = mean_problem(p).seqlen_q;
  const int64_t bytes_per_head = rows * (p.group_size() / plan.split.head_parts) * (6 * p.head_dim + 2 * p.head_dim_v);
  return std::min(l2_bytes / 2, rows << 14) / bytes_per_head;
}

/// Whether causal attention ends with several heads at a time. In a fixed order tiles have to descend for it.
bool has_last_group(const Plan& plan, const ForwardParams& p) {
  return rows_see_prefixes(p) && (!plan.dq.is_ordered() || plan.variant->descends);
}

// Of heads_of_last_group(), measured in benchmarks/experiments/032: with fewer rounds of tiles all heads are one group,
// of long heads (from so many key blocks on) with more; the last group has two rounds of tiles, of short heads one.
constexpr int kLeastRounds = 3, kLeastRoundsOfLongHeads = 6, kBlocksOfLongHeads = 32, kBlocksOfTwoRounds = 16;

/// How many heads are worked on together at the end of causal attention, so that all CTAs finish together. Their rows
/// have to be prepared before (plan_preparation), which short sequences pay for.
int64_t heads_of_last_group(const Plan& plan, int64_t heads) {
  const int rounds = plan.order.num_tiles / plan.order.tiles_at_once, n_blocks = plan.order.num_n_blocks;
  if (rounds < (n_blocks < kBlocksOfLongHeads ? kLeastRounds : kLeastRoundsOfLongHeads)) return heads;
  const int last_rounds = n_blocks < kBlocksOfTwoRounds ? 1 : 2;
  return std::min(heads, ceil_div(last_rounds * plan.order.tiles_at_once, n_blocks));
}

/// The order of tiles, and how many heads are worked on together: as few as keep every SM busy, so that Q, dO and
/// dq_accum stay in L2, but in a fixed order as many as let no tile wait for one that has not begun.
void plan_order(Plan& plan, const ForwardParams& p, const DeviceInfo& device) {
  const int64_t heads = num_batch_heads(plan, p);
  const int heads_at_once = std::max(1, plan.order.tiles_at_once / plan.order.num_n_blocks);
  int64_t group = 1, last = 0;
  if (rows_see_prefixes(p)) {
    // Steps of as many query rows as a tile has keys (d64) leave it no time between its neighbour's turn and its own,
    // if they are of one head: benchmarks/experiments/030.
    const bool square = plan.variant->block_m == plan.variant->block_n;
    group = clamp<int64_t>(heads_in_l2(plan, p, device.l2_bytes), 1, square ? 4 : 1);
    // The last columns first, each tile a step behind the neighbour: benchmarks/experiments/030.
    plan.order.falling = plan.dq.is_ordered() || heads_at_once >= (p.is_varlen_k() ? 8 : square ? 4 : 1);
    if (has_last_group(plan, p)) {
      last = heads_of_last_group(plan, heads);
      plan.order.last_packed_blocks =
          static_cast<int>(ceil_div(plan.order.tiles_at_once, p.num_heads_k * plan.split.parts()));
    } else {
      while (heads % group != 0) --group;  // no heads are left over for a last group
    }
  } else if (plan.dq.is_ordered()) {
    group = heads_at_once;
    plan.order.wide_groups = true;
    // What the mask shows is not known here. If it is all, either direction will do; if rows see prefixes, each tile is
    // a step behind the neighbour this way, and waits for the longest the other: benchmarks/experiments/178.
    plan.order.falling = p.mask.data != nullptr;
  }
  group = std::min(group, heads);
  plan.order.heads_per_group = static_cast<int>(group);
  plan.order.grouped_heads = static_cast<int>((heads - last) / group * group);
}

/// Whether packed sequences of queries and of keys have the same lengths: the host sees only that it is one tensor.
bool has_same_lengths(const ForwardParams& p) {
  return p.is_varlen_k() && p.cu_seqlens_q == p.cu_seqlens_k && p.seqlen_q == p.seqlen_k && p.total_q == p.total_k &&
         p.seqused_q == nullptr && p.seqused_k == nullptr;
}

/// Tiles, and key blocks of a sequence; of packed sequences on average.
struct ExpectedTiles {
  int64_t all, n_blocks;
  ExpectedTiles(const Plan& plan, const ForwardParams& p)
      : all(plan.order.num_tiles), n_blocks(plan.order.num_n_blocks) {
    if (!p.is_varlen_k()) return;
    all = p.total_k / plan.variant->block_n * p.num_heads_k * plan.split.parts();
    n_blocks = p.total_k / p.batch / plan.variant->block_n;
  }
};

/// Whether tiles have shares of the query rows (schedule/shares.h).
bool shares_rows(const Plan& plan, const ForwardParams& p) {
  const bool in_32_bits = int64_t{plan.order.num_n_blocks + 1} * plan.num_m_blocks < INT32_MAX &&
                          int64_t{plan.num_blocks} * p.num_heads < INT32_MAX / 4;
  return (p.is_dense() || has_same_lengths(p)) && in_32_bits && plan.split.row_parts == 1;
}

/// Of a group of heads, but for the last group of a dense batch.
int64_t max_group_tiles(const Plan& plan, const ForwardParams& p) {
  const int64_t tiles = int64_t{plan.order.num_n_blocks} * plan.order.heads_per_group;
  return plan.order.wide_groups || p.is_varlen_k() ? std::max<int64_t>(tiles, plan.order.tiles_at_once) : tiles;
}

/// Whether DqPath::kOneCta takes the problem.
bool takes_one_cta(const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  return params.dq.data != nullptr && p.is_dense() && every_row_sees_first_key(p);
}

// Of one_cta_pays(), measured in benchmarks/experiments/048: up to how many query rows a head is short, how many key
// blocks a short head may have, and how many percent of the CTAs have to be busy for one, two and more key blocks.
constexpr int64_t kFewRows = 512, kMostKeyBlocks = 3, kMostKeyBlocksCausal = 4;
constexpr int64_t kBusyPercentOfOneBlock = 50, kBusyPercentOfTwoBlocks = 70, kBusyPercent = 84;

/// Head dimension 64 has a kernel that keeps a head's dQ to one CTA, which spares dq_accum and its order, and loses the
/// balance between CTAs: the longer a head, the better its CTAs' rounds have to be filled.
bool one_cta_pays(const ForwardParams& p, const DeviceInfo& device) {
  const int64_t heads = p.batch * p.num_heads_k, at_once = ceil_div(heads, device.num_sms) * device.num_sms;
  const int64_t n_blocks = ceil_div(p.seqlen_k, kD64Fused.block_n), busy_percent = 100 * heads / at_once;
  const bool few_rows = p.seqlen_q <= kFewRows;
  if (n_blocks == 1 && p.group_size() == 1) {  // the other has no more tiles
    return few_rows || busy_percent >= kBusyPercentOfOneBlock;
  }
  if (n_blocks <= 2) return busy_percent >= kBusyPercentOfTwoBlocks;
  return few_rows && n_blocks <= (rows_see_prefixes(p) ? kMostKeyBlocksCausal : kMostKeyBlocks) &&
         busy_percent >= kBusyPercent;
}

/// Whether the kernel has a warp to write dq: adding dQ in order may take it.
bool has_dq_writer(const Plan& plan) {
  return plan.variant->cluster == 1 && !(plan.variant->dq_path == DqPath::kWarp && plan.dq.is_ordered());
}

// Of plan_dq_writing(), measured in benchmarks/experiments/040: fewest key blocks of a head, fewest rounds of tiles,
// and where a warp stores dQ fewest steps beyond a share that a CTA has in all its tiles.
constexpr int64_t kLeastKeyBlocks = 4, kLeastRoundsToWrite = 3, kLeastSteps = 30;

/// Whether the main kernel writes dq itself. Its warp for that takes about as long over a tile's share as the others
/// over one or two steps, so a tile has to have several times as many steps as its share has blocks. The shares of the
/// last round of tiles are written at the end, so there have to be several rounds, and where a warp stores dQ, the more
/// the fewer steps a tile has.
DqWritingPlan plan_dq_writing(const Plan& plan, const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  const ExpectedTiles expected(plan, p);
  const int64_t n_blocks = expected.n_blocks;
  const int round = plan.order.tiles_at_once;
  DqWritingPlan writing;
  writing.by_last_block = p.window_right >= 0;
  // Tiles that add to a share come so much later in the order than the tile whose share it is; then a round of tiles.
  const int64_t later = writing.by_last_block && !plan.order.falling ? 0 : max_group_tiles(plan, p);
  const int64_t lag = later + round;
  writing.lag = static_cast<int>(std::min<int64_t>(lag, plan.order.num_tiles));
  const bool even = !p.has_window() || p.seqlen_q <= p.seqlen_k;
  const int64_t steps_over_share = writing.by_last_block ? n_blocks / 2 : n_blocks;
  const bool enough_steps =
      plan.variant->dq_path != DqPath::kWarp || expected.all * steps_over_share >= kLeastSteps * round;
  const bool several_rounds = expected.all >= kLeastRoundsToWrite * round && lag <= expected.all / 2;
  writing.enabled = params.dq.data != nullptr && shares_rows(plan, p) && even && n_blocks >= kLeastKeyBlocks &&
                    several_rounds && enough_steps && has_dq_writer(plan);
  return writing;
}

/// Sets what tiles prepare (preprocess/prepared_rows.h), and what another launch: so much that a tile finds its own
/// rows prepared by tiles more than a round before, and all heads of the last group, which begin at the same time. It
/// takes several rounds: benchmarks/experiments/038.
void plan_preparation(Plan& plan, const ForwardParams& p, const Forced& forced) {
  const bool out_fits_q = p.head_dim_v <= 64 * ceil_div(p.head_dim, 64), packed = p.is_varlen_k();
  if (!shares_rows(plan, p)) return;
  if (packed) plan.preparation.tiles = plan.order.num_tiles;
  const int64_t n_blocks = plan.order.num_n_blocks, group_size = p.group_size() / plan.split.head_parts;
  const int64_t rows_per_tile =
      packed ? plan.variant->block_n : ceil_div(plan.num_m_blocks, n_blocks) * plan.variant->block_m;
  if (!out_fits_q || rows_per_tile * group_size > kMaxPreparedRows || forced.preparation == 0) return;

  const int64_t ahead = plan.order.tiles_at_once * 5 / 4;  // tiles, or heads of a CTA each
  int64_t first = max_group_tiles(plan, p) + ahead;
  if (plan.variant->dq_path == DqPath::kOneCta) {
    first = ahead * n_blocks;
  } else if (!packed) {
    const int64_t heads = num_batch_heads(plan, p), last_heads = heads - plan.order.grouped_heads;
    const int64_t last_begins = plan.order.grouped_heads * n_blocks + std::max<int64_t>(0, last_heads - 1);
    first = std::max(first, heads * n_blocks - last_begins + ahead);
  }
  if (!packed) first = ceil_div(first, n_blocks) * n_blocks;  // whole heads
  if (4 * first > 3 * ExpectedTiles(plan, p).all) return;
  plan.preparation.ahead = static_cast<int>(first);
  if (packed) {
    plan.preparation.tiles = first;
  } else {
    plan.preparation.heads = first / n_blocks * group_size;
  }
}

/// The first, by rising head dims, that takes the problem's; else the last.
const Variant& first_to_take(const ForwardParams& p, std::initializer_list<const Variant*> variants) {
  for (const Variant* variant : variants) {
    if (p.head_dim <= variant->head_dim && p.head_dim_v <= variant->head_dim_v) return *variant;
  }
  return **(variants.end() - 1);
}

// Of plans for one kind of mask: launches that come to nothing take about 10 us.
constexpr int kLeastRoundsOfKind = 2;

bool is_worth_launches(const Plan& plan) {
  return plan.order.num_tiles >= kLeastRoundsOfKind * plan.order.tiles_at_once;
}

}  // namespace

const Variant& variant_for(const ForwardParams& p) {
  return first_to_take(p, {&kD64, &kD96, &kD128, &kD192V128, &kD192, &kD256});
}

Plan choose_band_plan(const BackwardParams& params, const DeviceInfo& device) {
  const ForwardParams& p = params.forward;
  const Forced forced;
  if (!mask_may_be_band(p) || params.dmask != nullptr || forced.any()) return {};
  BackwardParams banded = params;
  banded.forward = band_problem(p);
  Plan plan =
      choose_plan(banded, device, first_to_take(p, {&kD64Band, &kD96Band, &kD128Band, &kD192Band, &kD256Band}), forced);
  return plan.split.parts() == 1 && is_worth_launches(plan) ? plan : Plan{};
}

Plan choose_bits_plan(const BackwardParams& params, const DeviceInfo& device) {
  const Forced forced;
  // What sums up these gradients asks nobody whether it should.
  const bool sums = params.dmask != nullptr || params.dslopes != nullptr || params.dsinks != nullptr;
  if (!mask_may_be_bits(params.forward) || sums || forced.any()) return {};
  BackwardParams bits = params;
  bits.forward = bits_problem(params.forward);
  const Variant& variant = extended_variant_for(bits);
  // The same one looks at classes of mask and passes over values where there are none to add.
  if (&variant == &extended_variant_for(params)) return {};
  const Plan plan = choose_plan(bits, device, variant, forced);
  return is_worth_launches(plan) ? plan : Plan{};
}

Plan choose_plan(const BackwardParams& params, const DeviceInfo& device) {
  const Forced forced;
  const Variant& variant = is_extended(params.forward) ? extended_variant_for(params) : variant_for(params.forward);
  const bool can = &variant == &kD64 && takes_one_cta(params);
  const bool one_cta = can && (forced.one_cta < 0 ? one_cta_pays(params.forward, device) : forced.one_cta > 0);
  const Plan plan = choose_plan(params, device, one_cta ? kD64Fused : variant, forced);
  forced.decisions.require("one_cta", forced.one_cta, one_cta);
  forced.decisions.require("head_parts", forced.head_parts, plan.split.head_parts);
  forced.decisions.require("row_parts", forced.row_parts, plan.split.row_parts);
  forced.decisions.require("dq_writing", forced.dq_writing, plan.dq.writing.enabled);
  forced.decisions.require("preparation", forced.preparation, plan.preparation.ahead > 0);
  return plan;
}

Plan choose_plan(const BackwardParams& params, const DeviceInfo& device, const Variant& variant, const Forced& forced) {
  const ForwardParams& p = params.forward;
  const bool one_cta = variant.dq_path == DqPath::kOneCta;
  Plan plan;
  plan.variant = &variant;
  plan.num_m_blocks = static_cast<int>(ceil_div(p.seqlen_q, variant.block_m));
  plan.num_blocks = static_cast<int>(p.is_varlen_q() ? max_packed_blocks(p.total_q, p.batch, variant.block_m)
                                                     : p.batch * plan.num_m_blocks);
  plan.order.tiles_at_once = std::max(1, device.num_sms / variant.cluster);
  plan.order.num_n_blocks = static_cast<int>(ceil_div(p.seqlen_k, variant.block_n));
  if (p.is_varlen_k()) {
    plan.order.max_packed_blocks = static_cast<int>(max_packed_blocks(p.total_k, p.batch, variant.block_n));
  }
  plan.preparation.heads = p.batch * p.num_heads;
  plan.split.part_blocks = plan.num_m_blocks;
  if (!one_cta) {
    plan.split.head_parts = head_parts(plan, p, forced);
    if (plan.split.head_parts == p.group_size() && !variant.extended) {
      plan.split.part_blocks = static_cast<int>(part_blocks(plan, p, forced));
      plan.split.row_parts = static_cast<int>(ceil_div(plan.num_m_blocks, plan.split.part_blocks));
    }
  }
  plan.order.num_tiles = static_cast<int>(num_tiles(plan, p));
  plan.grid = plan.order.num_tiles * variant.cluster;
  if (one_cta) {
    plan.order.grouped_heads = static_cast<int>(num_batch_heads(plan, p));
    plan.dynamic = true;
    plan.grid = static_cast<int>(std::min<int64_t>(p.batch * p.num_heads_k, device.num_sms));
    plan_preparation(plan, p, forced);
    return plan;
  }
  if (p.deterministic && params.dq.data != nullptr) plan.dq.protocol = DqProtocol::kOrdered;
  plan_order(plan, p, device);
  if (!plan.dq.is_ordered()) {
    // Head dim 64, whose consumers add dQ from registers, with zeros before: benchmarks/experiments/043.
    const bool beyond_warps = !variant.extended && (variant.cluster > 1 || plan.order.falling);
    const bool claims_pay = variant.dq_path == DqPath::kWarp || beyond_warps;
    plan.dq.protocol = claims_pay ? DqProtocol::kFirstStores : DqProtocol::kZeroed;
  }
  const bool meet = plan.dq.protocol == DqProtocol::kFirstStores || (variant.extended && !plan.dq.is_ordered());
  plan.dq.spread_starts = meet && !p.has_window();
  if (variant.cluster == 1 && plan.order.num_tiles > device.num_sms) {
    plan.dynamic = true;  // benchmarks/experiments/033
    plan.grid = device.num_sms;
  }
  if (variant.extended) {
    plan.extended = plan_extended(plan, params, device);
    return plan;
  }
  plan_preparation(plan, p, forced);
  plan.dq.writing = plan_dq_writing(plan, params);
  if (forced.dq_writing == 0) plan.dq.writing.enabled = false;
  return plan;
}

}  // namespace flash_attn::cuda::sm90::backward
