#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../../../sequence.h"

namespace flash_attn::cuda::sm80 {
namespace {

constexpr int kReservedBytes = 1024;  // of shared memory, a block, by the system
constexpr int kMaxSeenWords = 1024;   // 8 KB: of 65,536 columns

const ForwardVariants& variants_for(const ForwardParams& p) {
  const ForwardVariants* const all[] = {&kForwardD64, &kForwardD96, &kForwardD128, &kForwardD192, &kForwardD256};
  const int64_t columns = std::max(p.head_dim, p.head_dim_v);
  for (const ForwardVariants* variants : all) {
    if (columns <= variants->begin()->head_dim) return *variants;
  }
  return kForwardD256;
}

/// How many blocks of the variant an SM holds, and with how many slots each; false: none.
bool fit(const ForwardVariant& variant, const DeviceInfo& device, ForwardPlan& plan) {
  const int bytes_per_sm = device.shared_memory_per_block + kReservedBytes;
  for (int blocks = variant.blocks_per_sm; blocks >= 1; --blocks) {
    const int bytes = bytes_per_sm / blocks - kReservedBytes - variant.query_bytes -
                      (variant.extended ? 128 + 8 * plan.seen_words : 0);
    const int slots = std::min(variant.min_slots + 2, bytes / variant.slot_bytes);
    if (slots < variant.min_slots) continue;
    plan.slots = slots;
    plan.blocks_per_sm = blocks;
    return true;
  }
  return false;
}

/// Heads whose K and V together take about half of L2: their tiles follow each other.
int heads_per_group(const ForwardParams& p, int64_t l2_bytes) {
  const int64_t bytes_per_head = 2 * p.seqlen_k * (p.head_dim + p.head_dim_v);
  const int64_t kv_heads = std::max<int64_t>(1, l2_bytes / 2 / std::max<int64_t>(1, bytes_per_head));
  return int(std::min(kv_heads * p.group_size(), p.batch * p.num_heads));
}

/// A boolean mask always: bits cost an eighth of its bytes. An additive one where reading it once more is cheap beside
/// the scores that it is added to.
bool packs_mask(const ForwardParams& p) {
  if (p.mask.data == nullptr) return false;
  const int64_t size = p.mask.batch_size * p.mask.head_size * p.mask.row_size * p.mask.col_size;
  return p.mask.packed != nullptr || p.has_bool_mask() || 4 * size <= p.batch * p.num_heads * p.seqlen_q * p.seqlen_k;
}

}  // namespace

bool is_extended(const ForwardParams& p) {
  // Plain kernels look for the largest q.k before they scale it, which a factor below 0 makes the smallest.
  return !(p.softmax_scale > 0.0) || p.mask.data != nullptr || p.alibi_slopes != nullptr || p.softcap > 0.0 ||
         p.dropout_p > 0.0;
}

bool is_aligned(const ForwardParams& p) {
  const auto whole = [](const TensorView& view) {
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.batch % 8 == 0 && view.row % 8 == 0 &&
           view.head % 8 == 0;
  };
  return p.head_dim % 8 == 0 && p.head_dim_v % 8 == 0 && whole(p.q) && whole(p.k) && whole(p.v) && whole(p.out);
}

ForwardPlan plan_forward(const ForwardParams& p, const DeviceInfo& device) {
  const char* forced = std::getenv("FLASH_ATTN_FORWARD_KERNEL");
  // Names of other families' kernels are not meant for this one.
  if (forced != nullptr && std::string(forced).rfind("mma ", 0) != 0) forced = nullptr;
  ForwardPlan plan;
  plan.aligned = is_aligned(p);
  const bool extended = is_extended(p) || !plan.aligned;
  plan.packs_mask = packs_mask(p);
  if (plan.packs_mask) {
    plan.workspace_bytes = mask::packing_workspace(p.mask);
    plan.seen_words = int(std::min<int64_t>(kMaxSeenWords, ceil_div(p.seqlen_k, 64)));
  }
  for (const ForwardVariant& variant : variants_for(p)) {
    if (variant.extended != extended) continue;
    if (forced != nullptr && std::string(forced) != variant.name) continue;
    if (!fit(variant, device, plan)) continue;
    plan.variant = &variant;
    break;
  }
  if (plan.variant == nullptr && forced == nullptr) return plan;
  if (plan.variant == nullptr) {
    std::string names;
    for (const ForwardVariant& variant : variants_for(p))
      names += std::string(names.empty() ? "" : ", ") + variant.name;
    throw std::runtime_error(std::string("FLASH_ATTN_FORWARD_KERNEL=") + forced +
                             " does not take this problem; the kernels of its head dimension are: " + names);
  }
  const int64_t block_m = plan.variant->block_m, m_blocks = ceil_div(p.seqlen_q, block_m);
  plan.num_m_blocks = p.is_varlen_q() ? std::min(p.total_q / block_m + p.batch, p.batch * m_blocks) : m_blocks;
  plan.num_tiles = plan.num_m_blocks * p.num_heads * (p.is_varlen_q() ? 1 : p.batch);
  plan.longest_first = p.window_right >= 0 && p.window_left < 0;
  plan.heads_per_group = plan.longest_first ? heads_per_group(p, device.l2_bytes) : 1;
  return plan;
}

}  // namespace flash_attn::cuda::sm80
