#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../../sequence.h"

namespace flash_attn::cuda::decode {
namespace {

constexpr int kReservedBytes = 1024;  // of shared memory, a block, by the system
constexpr int kMaxStages = 6;

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

/// A decision that FLASH_ATTN_DECODE_PLAN="stages=3,min_units=2" takes, for measurements.
int forced(const char* name, int otherwise) {
  const char* plan = std::getenv("FLASH_ATTN_DECODE_PLAN");
  const char* found = plan != nullptr ? std::strstr(plan, name) : nullptr;
  return found != nullptr && found[std::strlen(name)] == '=' ? std::atoi(found + std::strlen(name) + 1) : otherwise;
}

}  // namespace

double max_units(const ForwardParams& p, const Variant& variant) {
  const double rows = double(p.seqlen_q) * double(p.group_size());
  const double tiles = double(int64_t(rows + variant.block_m - 1) / variant.block_m) * double(p.num_heads_k);
  double keys = double(p.seqlen_k);
  if (p.window_left >= 0 && p.window_right >= 0) {
    keys = std::min(keys, double(p.window_left) + double(p.window_right) + double(p.seqlen_q));
  }
  return double(p.batch) * tiles * (keys / variant.block_n + 2);
}

namespace {

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

/// The variant with as many stages as fit with as many CTAs an SM as it is made for; null if not even two do.
DecodePlan fitting(const Variant& variant, const DeviceInfo& device) {
  DecodePlan plan;
  for (int blocks = variant.blocks_per_sm; blocks >= 1; --blocks) {
    const int bytes = (device.shared_memory_per_block + kReservedBytes) / blocks - kReservedBytes;
    const int stages = std::min(kMaxStages, (bytes - variant.fixed_bytes) / variant.stage_bytes);
    if (stages < 2) continue;
    plan.variant = &variant;
    plan.stages = std::clamp(forced("stages", stages), 2, stages);
    plan.ctas = forced("ctas", blocks * device.num_sms);
    return plan;
  }
  return plan;
}

}  // namespace

DecodePlan plan_decode(const ForwardParams& p, const DeviceInfo& device, bool float8) {
  const Variants& variants = variants_for(std::max(p.head_dim, p.head_dim_v), float8);
  const int64_t rows = p.seqlen_q * p.group_size();
  int wanted = 0;
  while (wanted + 1 < variants.count && rows > variants.first[wanted].block_m) ++wanted;
  DecodePlan plan;
  for (int i = wanted; i >= 0 && plan.variant == nullptr; --i) plan = fitting(variants.first[i], device);
  if (plan.variant == nullptr) return plan;
  plan.min_units = std::max(1, forced("min_units", 1));
  const int64_t tiles = p.batch * p.num_heads_k * ceil_div(rows, plan.variant->block_m);
  plan.ctas = int(std::clamp(max_units(p, *plan.variant), 1.0, double(plan.ctas)));
  plan.ctas = even_ctas(plan.ctas, tiles);
  return plan;
}

}  // namespace flash_attn::cuda::decode
