#include "plan.h"

#include <algorithm>

#include "../../../mask/unpacked_mask.h"
#include "../../forward/plan.h"
#include "../../refusals.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

constexpr int kStaticBytes = 256;  // of shared memory, beside the tiles
constexpr int64_t kAlignment = 256;

/// The first that fits. Those that take every rule of scores are for 64 columns at least.
const BackwardVariant* choose_variant(const ForwardParams& p, const DeviceInfo& device, const Kernels& kernels,
                                      bool of_keys) {
  const int64_t columns = std::max({p.head_dim, p.head_dim_v, int64_t{is_extended(p) ? 64 : 0}});
  for (const BackwardVariant& variant : variants_for(kernels.backward, columns)) {
    if (variant.of_keys == of_keys && variant.extended == is_extended(p) &&
        variant.shared_bytes + kStaticBytes <= device.shared_memory_per_block) {
      return &variant;
    }
  }
  return nullptr;
}

void lay_out_workspace(BackwardPlan& plan, const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t start = end;
    end += ceil_div(bytes, kAlignment) * kAlignment;
    return start;
  };
  take(universal::RowWorkspace::bytes(params));
  plan.flags = take(p.batch * p.num_heads_k * int64_t{sizeof(int)});
  const int columns = plan.of_keys->head_dim;
  plan.q = plan.dout = Planes::of_queries(p, columns);
  plan.k = plan.v = Planes::of_keys(p, columns);
  const int64_t q_batches = p.is_varlen_q() ? 1 : p.batch, k_batches = p.is_varlen_k() ? 1 : p.batch;
  plan.q_data = take(plan.q.data_bytes(q_batches));
  plan.dout_data = take(plan.q.data_bytes(q_batches));
  plan.k_data = take(plan.k.data_bytes(k_batches));
  plan.v_data = take(plan.v.data_bytes(k_batches));
  plan.q_units = take(plan.q.unit_bytes(q_batches));
  plan.dout_units = take(plan.q.unit_bytes(q_batches));
  plan.k_units = take(plan.k.unit_bytes(k_batches));
  plan.v_units = take(plan.v.unit_bytes(k_batches));
  plan.packs_mask = packs_mask(p);
  plan.packed_mask = take(plan.packs_mask ? mask::packing_workspace(p.mask) : 0);
  plan.unpacked_mask = take(mask::unpacked_bytes(p.mask));
  plan.workspace_bytes = end;
}

}  // namespace

BackwardPlan plan_backward(const BackwardParams& params, const DeviceInfo& device, const Kernels& kernels) {
  BackwardPlan plan;
  plan.of_keys = choose_variant(params.forward, device, kernels, true);
  plan.of_queries = choose_variant(params.forward, device, kernels, false);
  if (plan.of_keys != nullptr && plan.of_queries != nullptr) lay_out_workspace(plan, params);
  return plan;
}

Plan describe(const BackwardPlan& chosen) {
  Plan plan{chosen.of_keys->name, chosen.of_keys->block_n, chosen.of_keys->block_m, chosen.workspace_bytes};
  plan.decide("products", "of pairs of fp16");
  plan.decide("dq", chosen.of_queries->name);
  if (chosen.packs_mask) plan.decide("mask", "packed first");
  return plan;
}

}  // namespace flash_attn::cuda::sm80::fp32
