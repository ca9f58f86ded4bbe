#include "plan.h"

#include <algorithm>

#include "../../../mask/unpacked_mask.h"
#include "../../forward/plan.h"
#include "../../refusals.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

constexpr int kStaticBytes = 512;  // of shared memory, beside the tiles
constexpr int64_t kAlignment = 256;

/// The first that fits. Those that take every rule of scores are for 64 columns at least.
const BackwardVariant* choose_variant(const ForwardParams& p, const DeviceInfo& device, const Kernels& kernels,
                                      int gradients) {
  const int64_t columns = std::max({p.head_dim, p.head_dim_v, int64_t{is_extended(p) ? 64 : 0}});
  for (const BackwardVariant& variant : variants_for(kernels.backward, columns)) {
    if (variant.gradients == gradients && variant.extended == is_extended(p) &&
        variant.shared_bytes + kStaticBytes <= device.shared_memory_per_block) {
      return &variant;
    }
  }
  return nullptr;
}

/// Whether the kernel that computes dS, in units of scores, adds it to the gradient of attn_mask; else that is a launch
/// of the universal kernels. Rows or columns that many tiles share would be added to by all of them at once.
bool adds_mask_gradient(const ForwardParams& p) {
  return !p.deterministic && p.softcap == 0.0 && p.mask.row_size > 1 && p.mask.col_size > 1;
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
  const int columns = plan.kernels[0]->head_dim;
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

BackwardPlan plan_backward(const BackwardParams& params, const DeviceInfo& device, const Kernels& family) {
  BackwardPlan plan;
  const ForwardParams& p = params.forward;
  const Kernels& kernels = family.allowed(p);
  plan.products = kernels.products;
  const bool all = params.dq.data != nullptr && (params.dk.data != nullptr || params.dv.data != nullptr);
  constexpr int kWays[][BackwardPlan::kMaxKernels] = {{kDq | kDk | kDv}, {kDk | kDv, kDq}, {kDk, kDv, kDq}};
  for (const auto& way : kWays) {
    // The gradient of slopes is one of rows, and a fixed order is that of one owner.
    if ((way[0] & kDq) != 0 && (!all || p.deterministic || params.dslopes != nullptr)) continue;
    bool complete = true;
    for (int i = 0; i < BackwardPlan::kMaxKernels; ++i) {
      plan.kernels[i] = way[i] != 0 ? choose_variant(p, device, kernels, way[i]) : nullptr;
      complete = complete && (way[i] == 0 || plan.kernels[i] != nullptr);
    }
    if (complete) break;
    plan.kernels[0] = nullptr;
  }
  if (plan.kernels[0] == nullptr) return {};
  plan.adds_mask_gradient = params.dmask != nullptr && adds_mask_gradient(p);
  lay_out_workspace(plan, params);
  return plan;
}

Plan describe(const BackwardPlan& chosen) {
  const BackwardVariant& first = *chosen.kernels[0];
  Plan plan{first.name, first.block_n, first.block_m, chosen.workspace_bytes};
  plan.decide("products", chosen.products);
  const char* of_dq = "added to zeros";
  for (const BackwardVariant* variant : chosen.kernels) {
    if (variant != nullptr && !variant->of_keys()) of_dq = variant->name;
  }
  plan.decide("dq", of_dq);
  if (chosen.adds_mask_gradient) plan.decide("dmask", "added to zeros");
  if (chosen.packs_mask) plan.decide("mask", "packed first");
  return plan;
}

}  // namespace flash_attn::cuda::sm80::fp32
