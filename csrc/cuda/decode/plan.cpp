#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../../sequence.h"

namespace flash_attn::cuda::decode {
namespace {

constexpr int kReservedBytes = 1024;  // of shared memory, a block, by the system
constexpr int kMaxStages = 6;

const Variants& variants_for(int64_t head_dim) {
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

DecodePlan plan_decode(const ForwardParams& p, const DeviceInfo& device) {
  const Variants& variants = variants_for(std::max(p.head_dim, p.head_dim_v));
  const int64_t rows = p.seqlen_q * p.group_size();
  DecodePlan plan;
  for (int i = rows <= variants.first[0].block_m ? 0 : 1; i < variants.count; ++i) {
    const Variant& variant = variants.first[i];
    for (int blocks = variant.blocks_per_sm; blocks >= 1 && plan.variant == nullptr; --blocks) {
      const int bytes = (device.shared_memory_per_block + kReservedBytes) / blocks - kReservedBytes;
      const int stages = std::min(kMaxStages, (bytes - variant.fixed_bytes) / variant.stage_bytes);
      if (stages < 2) continue;
      plan.variant = &variant;
      plan.stages = std::clamp(forced("stages", stages), 2, stages);
      plan.ctas = forced("ctas", blocks * device.num_sms);
    }
    if (plan.variant != nullptr) break;
  }
  if (plan.variant == nullptr) return plan;
  plan.min_units = std::max(1, forced("min_units", 1));
  plan.ctas = int(std::clamp(max_units(p, *plan.variant), 1.0, double(plan.ctas)));
  // Where nearly all CTAs still have a share, as many for each tile: then none has parts of two.
  const int64_t tiles = p.batch * p.num_heads_k * ceil_div(rows, plan.variant->block_m);
  const int64_t even = tiles > 0 && tiles <= plan.ctas ? plan.ctas / tiles * tiles : 0;
  if (even * 20 >= plan.ctas * 19) plan.ctas = int(even);
  return plan;
}

}  // namespace flash_attn::cuda::decode
