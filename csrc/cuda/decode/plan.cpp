#include "plan.h"

#include <algorithm>

#include "../../sequence.h"
#include "../common/clusters.h"
#include "../common/forced_decisions.h"

namespace flash_attn::cuda::decode {
namespace {

constexpr int kReservedBytes = 1024;  // of shared memory, a block, by the system
constexpr int kMaxStages = 6;
constexpr int64_t kEnoughBytes = 128 << 10;  // of an SM's stages
constexpr int64_t kRowsOfWarps = 32;         // packed; more are a warpgroup's where there is one

const Variants& variants_for(int64_t head_dim, bool float8) {
  if (float8) {
    for (const Variants* variants : {&kD64Float8, &kD128Float8, &kD192Float8}) {
      if (head_dim <= variants->first->head_dim) return *variants;
    }
    return kD256Float8;
  }
  for (const Variants* variants : {&kD64, &kD96, &kD128, &kD192}) {
    if (head_dim <= variants->first->head_dim) return *variants;
  }
  return kD256;
}

/// Tiles of 64 rows by a warpgroup; null where there is none.
const Variant* warpgroup_for([[maybe_unused]] int64_t head_dim, [[maybe_unused]] const DeviceInfo& device) {
#ifdef FLASH_ATTN_WITH_SM90
  if (device.compute_capability != 90) return nullptr;
  for (const Variant* variant : {&kD64Warpgroup, &kD96Warpgroup, &kD128Warpgroup, &kD192Warpgroup, &kD256Warpgroup}) {
    if (head_dim <= variant->head_dim) return variant;
  }
#endif
  return nullptr;
}

/// -1: decided here.
struct Forced {
  int tile = -1;       // packed rows, at least
  int warpgroup = -1;  // 0: tiles of warps, whatever their rows
  int stages = -1, ctas = -1, cluster = -1;

  ForcedDecisions decisions{"FLASH_ATTN_DECODE_PLAN",
                            {{"tile", &tile, 16, 64},
                             {"warpgroup", &warpgroup, 0, 1},
                             {"stages", &stages, 2, kMaxStages},
                             {"ctas", &ctas, 1, 1 << 16},
                             {"cluster", &cluster, 1, 16}}};
};

int choose(int forced, int otherwise) { return forced >= 0 ? forced : otherwise; }

}  // namespace

int64_t tiles_of(const ForwardParams& p, const Variant& variant) {
  return p.batch * p.num_heads_k * ceil_div(p.seqlen_q * p.group_size(), variant.block_m);
}

double max_units(const ForwardParams& p, const Variant& variant) {
  const double rows = double(p.seqlen_q) * double(p.group_size());
  const double tiles = double(int64_t(rows + variant.block_m - 1) / variant.block_m) * double(p.num_heads_k);
  double blocks = double(ceil_div(p.seqlen_k, variant.block_n));
  if (p.window_left >= 0 && p.window_right >= 0) {  // which may begin and end within a block
    const double keys = double(p.window_left) + double(p.window_right) + double(p.seqlen_q);
    blocks = std::min(blocks, keys / variant.block_n + 2);
  }
  return double(p.batch) * tiles * std::max(1.0, blocks);
}

namespace {

/// Nearly twice as many CTAs as run at once, each with as many whole tiles: SMs that are near to memory take more of
/// them. 0: there are no such numbers, or tiles are of too few blocks for a CTA to begin anew.
int ctas_of_whole_tiles(int ctas, int64_t tiles, double blocks) {
  constexpr double kMinBlocks = 24;
  for (int twice = 2 * ctas; blocks >= kMinBlocks && twice * 10 >= ctas * 19; --twice) {
    if (tiles >= twice && tiles % twice == 0) return twice;
  }
  return 0;
}

/// Where nearly all CTAs still have a share, as many of them for each tile or of tiles for each: then none has parts of
/// two. Of parts best a multiple of as many as are put together at once.
int even_ctas(int ctas, int64_t tiles) {
  constexpr int kAtOnce = 16;
  int first = 0;
  for (int fewer = ctas; fewer * 20 >= ctas * 19; --fewer) {
    if (tiles <= 0 || (tiles % fewer != 0 && fewer % tiles != 0)) continue;
    if (first == 0) first = fewer;
    if (fewer < tiles || fewer / tiles % kAtOnce == 0) return fewer;
  }
  return first > 0 ? first : ctas;
}

/// A cluster for each of few tiles with few blocks, of as many CTAs; 1: none.
int cluster_of_tiles(const ForwardParams& p, const Variant& variant, const DeviceInfo& device) {
  if (variant.head_dim_v > kMaxHeadDim) return 1;
  // Of many rows parts take so long to be put together by one CTA that a CTA may have more to read, and some clusters
  // may wait for others.
  const bool many_rows = variant.block_m > 16;
  const int64_t few_bytes = (many_rows ? 256 : 128) << 10;  // of a CTA; of more the time of two CTAs an SM is less
  const int64_t tiles = tiles_of(p, variant), blocks = ceil_div(p.seqlen_k, variant.block_n);
  for (int cluster = kMostOfCluster; cluster > 1; cluster /= 2) {
    const int most = many_rows ? device.num_sms : ctas_in_clusters(device, cluster);
    if (tiles * cluster > most || blocks < cluster) continue;
    return ceil_div(blocks, cluster) * variant.stage_bytes <= few_bytes ? cluster : 1;
  }
  return 1;
}

/// Whether the plan's CTAs can be clusters of so many, of which as many have each tile.
bool can_cluster(const ForwardParams& p, const DecodePlan& plan, const DeviceInfo& device, int cluster) {
  constexpr int64_t kMostClusters = 32;  // of a tile
  const int64_t tiles = tiles_of(p, *plan.variant), parts = plan.ctas / tiles;
  return device.compute_capability == 90 && !p.is_varlen_q() && !p.is_varlen_k() && plan.ctas % tiles == 0 &&
         parts % cluster == 0 && parts / cluster <= kMostClusters && plan.stages >= plan.variant->cluster_stages;
}

/// The variant with as many stages as fit with as many CTAs an SM as it is made for; null if not even two do.
DecodePlan fitting(const Variant& variant, const DeviceInfo& device, int forced_stages) {
  DecodePlan plan;
  for (int blocks = variant.blocks_per_sm; blocks >= 1; --blocks) {
    const int bytes = (device.shared_memory_per_block + kReservedBytes) / blocks - kReservedBytes;
    const int most = std::min(kMaxStages, (bytes - variant.fixed_bytes) / variant.stage_bytes);
    if (most < 2) continue;
    // More bytes on their way than an SM needs make memory slower.
    const int enough = int(ceil_div(kEnoughBytes, int64_t{blocks} * variant.stage_bytes));
    const int stages = variant.block_m == 16 && !variant.float8 ? std::clamp(enough, 2, most) : most;
    plan.variant = &variant;
    plan.stages = std::clamp(choose(forced_stages, stages), 2, most);
    plan.ctas = blocks * device.num_sms;
    return plan;
  }
  return plan;
}

}  // namespace

bool is_latent(const ForwardParams& p, const DeviceInfo& device, bool float8) {
#ifdef FLASH_ATTN_WITH_SM90
  const bool part = p.v.data == p.k.data && p.v.batch == p.k.batch && p.v.row == p.k.row && p.v.head == p.k.head;
  return device.compute_capability == 90 && !float8 && part && p.head_dim > kMaxHeadDim &&
         p.head_dim <= kLatent.head_dim && p.head_dim_v <= kLatent.head_dim_v;
#else
  return false;
#endif
}

namespace {

/// With as many rows in a tile as the problem has, where there is such a kernel.
DecodePlan chosen_variant(const ForwardParams& p, const DeviceInfo& device, bool float8, const Forced& forced) {
#ifdef FLASH_ATTN_WITH_SM90
  if (is_latent(p, device, float8)) return fitting(kLatent, device, forced.stages);
#endif
  const int64_t head_dim = std::max(p.head_dim, p.head_dim_v), rows = p.seqlen_q * p.group_size();
  const Variants& variants = variants_for(head_dim, float8);
  const int64_t tile = choose(forced.tile, int(std::min<int64_t>(rows, 64)));
  int wanted = 0;
  while (wanted + 1 < variants.count && tile > variants.first[wanted].block_m) ++wanted;
  DecodePlan plan;
  const Variant* const warpgroup = float8 || forced.warpgroup == 0 ? nullptr : warpgroup_for(head_dim, device);
  if (warpgroup != nullptr && tile > kRowsOfWarps) plan = fitting(*warpgroup, device, forced.stages);
  for (int i = wanted; i >= 0 && plan.variant == nullptr; --i) plan = fitting(variants.first[i], device, forced.stages);
  return plan;
}

}  // namespace

DecodePlan plan_decode(const ForwardParams& p, const DeviceInfo& device, bool float8) {
  const Forced forced;
  DecodePlan plan = chosen_variant(p, device, float8, forced);
  if (plan.variant == nullptr) return plan;
  const int64_t tiles = tiles_of(p, *plan.variant);
  const int most = int(std::clamp(max_units(p, *plan.variant), 1.0, double(plan.ctas)));
  const bool alike = p.is_dense() && p.cache.first == nullptr;
  const int whole = alike ? ctas_of_whole_tiles(most, tiles, max_units(p, *plan.variant) / double(tiles)) : 0;
  const int shared_out = whole > 0 ? whole : even_ctas(most, tiles);
  const int cluster = choose(forced.cluster, forced.ctas < 0 ? cluster_of_tiles(p, *plan.variant, device) : 1);
  plan.ctas = choose(forced.ctas, cluster > 1 ? int(tiles) * cluster : shared_out);
  if (cluster > 1 && can_cluster(p, plan, device, cluster)) {
    plan.cluster = cluster;
  } else {
    plan.ctas = choose(forced.ctas, shared_out);
  }
  forced.decisions.require("stages", forced.stages, plan.stages);
  forced.decisions.require("cluster", forced.cluster, plan.cluster);
  return plan;
}

}  // namespace flash_attn::cuda::decode
