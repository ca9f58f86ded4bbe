// What the plan of a kernel of extended/ decides beside plan.cpp.
#include "../plan.h"

#include "../../../sm80/sm80.h"
#include "../../hopper/tensor_map.h"
#include "../../refusals.h"
#include "../launch.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

// Of adds_dmask(): a tile takes a step to add and to say so, which those after it wait for.
constexpr int64_t kMaxDmaskTurns = 16;
constexpr int64_t kMostKeysByLoads = 256;  // of packs_mask_first()

/// How many scores share a number of the mask, if no rows and no columns do.
int64_t scores_of_number(const ForwardParams& p) {
  const MaskView& mask = p.mask;
  return (mask.batch_size == 1 ? p.batch : 1) * (mask.head_size == 1 ? p.num_heads : 1);
}

/// Whether attn_mask is packed first. Tiles add up the gradient of what they have not read ahead.
bool packs_mask_first(const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  const int64_t sharing = params.dmask != nullptr ? kLeastSharing + 1 : kLeastSharing;
  // What tiles load by themselves takes them so long that from some keys on the launches pay.
  const bool pays = p.has_bias() && !has_mask_map(p) && p.seqlen_k > kMostKeysByLoads;
  return pays ? mask::is_read_ahead(p, sharing) : is_read_ahead(p, sharing);
}

/// Whether the tiles can store or add attn_mask's gradient, see extended/dmask.h; `has_follower`: a thread is free to
/// see to their turns.
bool tiles_store_dmask(const BackwardParams& params, bool has_follower) {
  const ForwardParams& p = params.forward;
  const bool whole = p.mask.row_size == p.seqlen_q && p.mask.col_size == p.seqlen_k;
  const bool in_turns = p.is_dense() && scores_of_number(p) <= kMaxDmaskTurns && has_follower;
  const bool bias_alone = has_mask_map(p) && !packs_mask_first(params) && p.softcap == 0.0 && p.dropout_p == 0.0 &&
                          p.alibi_slopes == nullptr;
  const bool in_32_bits = p.mask.row_size * p.mask.col_size < INT32_MAX;
  return params.dmask != nullptr && whole && in_32_bits && bias_alone && (scores_of_number(p) == 1 || in_turns);
}

/// How it comes together; if not there, the sm80 family's kernel adds it up.
void plan_dmask(ExtendedPlan& extended, const Plan& plan, const BackwardParams& params, const DeviceInfo& device) {
  if (params.dmask == nullptr) return;
  extended.stores_dmask = tiles_store_dmask(params, !(plan.dq.is_ordered() && plan.variant->dq_path == DqPath::kWarp));
  extended.adds_dmask = extended.stores_dmask && scores_of_number(params.forward) > 1;
  extended.computes_dmask = !extended.stores_dmask;
  if (extended.computes_dmask) {
    extended.dmask_bytes = sm80::kBackward.plan(of_dmask_alone(params), device).workspace_bytes;
  }
}

}  // namespace

bool is_extended(const ForwardParams& p) {
  return p.mask.data != nullptr || p.alibi_slopes != nullptr || p.sinks != nullptr || p.softcap > 0.0 ||
         p.dropout_p > 0.0;
}

const char* refuses_bias(const ForwardParams& p) {
  if (!p.has_bias() || has_mask_map(p)) return nullptr;
  if (p.mask.dtype != p.dtype && p.mask.dtype != DType::kFloat32) {
    return "attn_mask is neither boolean, float32 nor of q's dtype";
  }
  if (p.softcap > 0.0 || p.alibi_slopes != nullptr || p.dropout_p > 0.0) {
    return "beside softcap, alibi_slopes or dropout an additive attn_mask has no rows of q's dtype in whole, aligned "
           "pieces of 16 bytes";
  }
  return nullptr;
}

const Variant& extended_variant_for(const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  const bool needs_registers = p.has_bias() && (params.dmask != nullptr || !has_mask_map(p));
  const bool dmask = tiles_store_dmask(params, true);
  const Variant* const all[] = {&kD64Extended, &kD64Biased, &kD96Extended, &kD128Extended,
                                dmask ? &kD192Dmask : &kD192Extended};
  for (const Variant* variant : all) {
    if (p.has_bias() && !variant->takes_bias) continue;
    if (needs_registers && !variant->many_registers) continue;
    if (p.head_dim <= variant->head_dim && p.head_dim_v <= variant->head_dim_v) return *variant;
  }
  return dmask ? kD256Dmask : kD256Extended;
}

ExtendedPlan plan_extended(const Plan& plan, const BackwardParams& params, const DeviceInfo& device) {
  ExtendedPlan extended;
  extended.packs_mask = packs_mask_first(params);
  extended.bias_by_tma = has_mask_map(params.forward);
  plan_dmask(extended, plan, params, device);
  return extended;
}

}  // namespace flash_attn::cuda::sm90::backward
