#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../../../../select_kernel.h"
#include "../../../../sequence.h"
#include "../../../common/tiles/visibility.h"
#include "../../../mask/unpacked_mask.h"
#include "../../forward/plan.h"
#include "../../forward/schedule/schedule.h"
#include "../../refusals.h"
#include "../code.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

constexpr int kReservedBytes = 1024;  // of shared memory, a block, by the system
constexpr int kStaticBytes = 256;     // of it, by the kernel
constexpr int kMaxSlots = 4;
// Up to here a sum of float32 is nearly exact, and the roundings of pairs are seen: RMS errors of 64 rows are up
// to 1.15 times those of multiply-adds; of 256 and more they are the lesser ones. With so few columns that not even a
// forced family is to have pairs, 1.25 (benchmarks/experiments/085, 113).
constexpr int64_t kFewColumns = 32, kTooFewColumns = 16, kManyRows = 256;
constexpr const char* kFewColumnsReason = "in float32 plain multiply-adds are more exact over so few columns";
constexpr int64_t kAlignment = 256;

/// Columns that the kernels have to be for. Those that take every rule of scores are for 64 at least.
int64_t columns_of(const ForwardParams& p) {
  return std::max({p.head_dim, p.head_dim_v, int64_t{is_extended(p) ? 64 : 0}});
}

/// How many blocks of the variant an SM holds, and with how many slots each; false: none.
bool fit(const ForwardVariant& variant, const DeviceInfo& device, ForwardPlan& plan) {
  const int bytes_per_sm = device.shared_memory_per_block + kReservedBytes;
  for (int blocks = variant.blocks_per_sm; blocks >= 1; --blocks) {
    const int bytes = bytes_per_sm / blocks - kReservedBytes - kStaticBytes - variant.query_bytes;
    const int slots = std::min(kMaxSlots, bytes / variant.slot_bytes);
    if (slots < variant.least_slots) continue;
    plan.slots = slots;
    plan.blocks_per_sm = blocks;
    return true;
  }
  return false;
}

/// Heads whose K and V together take about half of L2: their tiles follow each other.
int heads_per_group(const ForwardParams& p, int columns, int64_t l2_bytes) {
  const int64_t bytes_per_head = 8 * p.seqlen_k * columns;
  const int64_t kv_heads = std::max<int64_t>(1, l2_bytes / 2 / std::max<int64_t>(1, bytes_per_head));
  return int(std::min(kv_heads * p.group_size(), p.batch * p.num_heads));
}

/// GeForce cards of Ampere, Ada and Blackwell. Others that share their compute capability have the whole rate; there
/// both ways are about as fast.
bool has_half_rate(const DeviceInfo& device) {
  const int capability = device.compute_capability;
  return capability == 86 || capability == 89 || capability / 10 == 12;
}

/// Whether tensor cores save more than the pass that splits numbers costs, which reads and writes each entry once. On
/// an H200 both are even at 16 operations a byte of the forward pass, and at 5 of the backward pass.
bool pays(const ForwardParams& given) {
  constexpr double kLeastFlops = 5e8;  // 17 us of the universal kernels on an H200
  constexpr double kFlopsPerByte = 10.0;
  constexpr int64_t kTile = 64;
  const ForwardParams p = mean_problem(given);
  const double scores = double(num_visible_tiles(p, kTile, kTile) * kTile * std::min(p.seqlen_q, kTile));
  const double flops = 2.0 * scores * double(p.batch * p.num_heads) * double(p.head_dim + p.head_dim_v);
  const double of_queries = double(p.seqlen_q * p.num_heads) * double(p.head_dim);
  const double of_keys = double(p.seqlen_k * p.num_heads_k) * double(p.head_dim + p.head_dim_v);
  const double bytes = 8.0 * double(p.batch) * (of_queries + of_keys);
  return flops >= std::max(kLeastFlops, kFlopsPerByte * bytes);
}

/// That a query row sees on average.
double mean_columns(const ForwardParams& given) {
  constexpr int64_t kTile = 64;
  const ForwardParams p = mean_problem(given);
  return double(num_visible_tiles(p, kTile, kTile) * kTile) / double(std::max<int64_t>(1, ceil_div(p.seqlen_q, kTile)));
}

void lay_out_workspace(ForwardPlan& plan, const ForwardParams& p) {
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t start = end;
    end += ceil_div(bytes, kAlignment) * kAlignment;
    return start;
  };
  take(p.batch * p.num_heads_k * int64_t{sizeof(int)});
  const int columns = plan.variant->head_dim;
  plan.q = Planes::of_queries(p, columns);
  plan.k = plan.v = Planes::of_keys(p, columns);
  const int64_t q_batches = p.is_varlen_q() ? 1 : p.batch, k_batches = p.is_varlen_k() ? 1 : p.batch;
  plan.q_data = take(plan.q.data_bytes(q_batches));
  plan.k_data = take(plan.k.data_bytes(k_batches));
  plan.v_data = take(plan.v.data_bytes(k_batches));
  plan.q_units = take(plan.q.unit_bytes(q_batches));
  plan.k_units = take(plan.k.unit_bytes(k_batches));
  plan.v_units = take(plan.v.unit_bytes(k_batches));
  plan.packs_mask = packs_mask(p);
  plan.packed_mask = take(plan.packs_mask ? mask::packing_workspace(p.mask) : 0);
  plan.unpacked_mask = take(mask::unpacked_bytes(p.mask));
  plan.workspace_bytes = end;
}

}  // namespace

// Asks of forward's parameters alone, so that both passes agree: P = exp(S - lse) of one with lse of the other would
// lose the rounding errors of S that they have in common.
const char* refuses(const ForwardParams& p, const DeviceInfo& device, const Kernels& family) {
  if (std::min(p.head_dim, p.head_dim_v) <= kTooFewColumns) return kFewColumnsReason;
  const Kernels& kernels = family.allowed(p);
  const bool exact = &kernels == &family;
  if (!is_forced(kernels.family)) {
    const ForwardParams mean = mean_problem(p);
    const bool few_rows = std::min(mean.seqlen_q, mean.seqlen_k) < kManyRows;
    if (exact && few_rows && std::min(p.head_dim, p.head_dim_v) <= kFewColumns) return kFewColumnsReason;
    if (exact && has_half_rate(device))
      return "in float32 plain multiply-adds are faster: products of fp16 run at half rate";
    if (!pays(p)) return "in float32 so few scores do not pay for splitting numbers into pairs";
  }
  if (columns_of(p) > kernels.max_head_dim()) {
    return kernels.max_head_dim() == 64 ? "in float32 head_dim is over 64" : "in float32 head_dim is over 256";
  }
  if (!has_code(10 * device.compute_capability)) return "its kernels for float32 are for compute capability 8 and 9";
  return nullptr;
}

ForwardPlan plan_forward(const ForwardParams& p, const DeviceInfo& device, const Kernels& family) {
  const Kernels& kernels = family.allowed(p);
  const ForwardVariants& variants = variants_for(kernels.forward, columns_of(p));
  const char* forced = std::getenv("FLASH_ATTN_FORWARD_KERNEL");
  // Names of other kernels are not meant for these.
  if (forced != nullptr && std::string(forced).rfind(kernels.prefix, 0) != 0) forced = nullptr;
  ForwardPlan plan;
  plan.products = kernels.products;
  for (const ForwardVariant& variant : variants) {
    if (variant.extended != is_extended(p)) continue;
    if (forced != nullptr && std::string(forced) != variant.name) continue;
    if (forced == nullptr && variant.least_columns > 0 && mean_columns(p) < variant.least_columns) continue;
    if (!fit(variant, device, plan)) continue;
    plan.variant = &variant;
    break;
  }
  if (plan.variant == nullptr && forced == nullptr) return plan;
  if (plan.variant == nullptr) {
    std::string names;
    for (const ForwardVariant& variant : variants) names += std::string(names.empty() ? "" : ", ") + variant.name;
    throw std::runtime_error(std::string("FLASH_ATTN_FORWARD_KERNEL=") + forced +
                             " does not take this problem; the kernels of its head dimension are: " + names);
  }
  plan.schedule = make_schedule(p, plan.variant->block_m, heads_per_group(p, plan.variant->head_dim, device.l2_bytes));
  lay_out_workspace(plan, p);
  return plan;
}

Plan describe(const ForwardPlan& chosen) {
  Plan plan{chosen.variant->name, chosen.variant->block_m, chosen.variant->block_n, chosen.workspace_bytes};
  plan.decide("products", chosen.products);
  plan.decide("blocks_per_sm", chosen.blocks_per_sm);
  plan.decide("slots", chosen.slots);
  if (chosen.packs_mask) plan.decide("mask", "packed first");
  return plan;
}

}  // namespace flash_attn::cuda::sm80::fp32
