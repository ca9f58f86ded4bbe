// The Hopper family's backward entry: what it takes, its plan, its launch.
#include "../../../select_kernel.h"
#include "../../common/tiles/sequence_blocks.h"
#include "../../sm80/sm80.h"
#include "../hopper/tensor_map.h"
#include "../refusals.h"
#include "../sm90.h"
#include "launch.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

constexpr int64_t kMaxRows = int64_t{1} << 27;  // so that bounds and differences of rows stay in 32 bits

const char* refuses_sizes(const ForwardParams& p) {
  if (p.seqlen_q >= kMaxRows || p.seqlen_k >= kMaxRows) return "a sequence is of over 2^27 rows";
  // Blocks of 64 rows, of which the row kernels launch up to two CTAs each.
  const auto too_many = [&](const SequenceBlocks& blocks) {
    return double(p.num_heads) * double(blocks.count() + p.batch) >= double(1 << 30);
  };
  if (too_many(SequenceBlocks::of_queries(p, 64)) || too_many(SequenceBlocks::of_keys(p, 64))) {
    return "there are over 2^30 tiles";
  }
  return nullptr;
}

const char* refuses_tensors(const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  const TensorMapSource sources[] = {
      query_rows(p, p.q, p.head_dim),
      query_rows(p, p.out, p.head_dim_v),
      query_rows(p, params.dout, p.head_dim_v),
      query_rows(p, params.dq, p.head_dim),
      key_rows(p, p.k, p.num_heads_k, p.head_dim),
      key_rows(p, p.v, p.num_heads_k, p.head_dim_v),
      key_rows(p, params.dk, p.num_heads_k, p.head_dim),
      key_rows(p, params.dv, p.num_heads_k, p.head_dim_v),
  };
  for (const TensorMapSource& source : sources) {
    if (const char* reason = source.view.data != nullptr ? tensor_map_refuses(source) : nullptr) return reason;
  }
  return nullptr;
}

/// Of scores that are more than scale * q.k.
const char* refuses_rules(const BackwardParams& params, const DeviceInfo& device) {
  const ForwardParams& p = params.forward;
  if (p.softcap > 0.0 && params.dslopes != nullptr) return "alibi_slopes have a gradient beside softcap";
  if (const char* reason = refuses_bias(p)) return reason;
  if (params.dmask != nullptr && sm80::kBackward.refuses(of_dmask_alone(params), device) != nullptr) {
    return "no kernel computes the gradient of attn_mask";
  }
  return nullptr;
}

const char* refuses(const BackwardParams& params, const DeviceInfo& device) {
  const ForwardParams& p = params.forward;
  if (const char* reason = refuses_in_both_passes(p, device)) return reason;
  if (const char* reason = refuses_sizes(p)) return reason;
  if (is_extended(p)) {
    if (const char* reason = refuses_rules(params, device)) return reason;
  }
  if (!(p.softmax_scale >= 1e-4 && p.softmax_scale <= 1e6)) return "softmax_scale is not between 1e-4 and 1e6";
  return refuses_tensors(params);
}

const char* name_of(DqProtocol protocol) {
  switch (protocol) {
    case DqProtocol::kUnshared: return "of one CTA";
    case DqProtocol::kZeroed: return "added to zeros";
    case DqProtocol::kFirstStores: return "first stores";
    default: return "in a fixed order";
  }
}

/// See Schedule.
const char* order_name(const Plan& plan) {
  if (plan.variant->dq_path == DqPath::kOneCta) return "head by head";
  return plan.order.falling ? "last columns first" : "first columns first";
}

/// How the gradient of attn_mask comes together, see ExtendedPlan.
const char* dmask_name(const ExtendedPlan& extended) {
  if (extended.computes_dmask) return "by another launch";
  return extended.adds_dmask ? "added by tiles in turn" : "stored by tiles";
}

/// How attn_mask comes to the tiles, see MaskSource.
const char* mask_name(const Plans& plans, const ForwardParams& p) {
  if (p.mask.packed != nullptr) return "prepared";
  if (plans.depend_on_kind()) return "packed first";
  switch (mask_source(plans.plan.extended, p)) {
    case MaskSource::kPacked: return "packed first";
    case MaskSource::kBytes: return "read with rows";
    default: return "read by tiles";
  }
}

flash_attn::Plan plan(const BackwardParams& params, const DeviceInfo& device) {
  const Plans plans = choose_plans(params, device);
  const Plan& chosen = plans.plan;
  flash_attn::Plan plan{chosen.variant->name, chosen.variant->block_m, chosen.variant->block_n,
                        workspace_bytes(plans, params)};
  plan.decide("ctas", chosen.grid);
  plan.decide("order", order_name(chosen));
  plan.decide("heads_per_group", chosen.order.heads_per_group);
  plan.decide("head_parts", chosen.split.head_parts);
  plan.decide("row_parts", chosen.split.row_parts);
  plan.decide("dq", name_of(chosen.dq.protocol));
  plan.decide("one_cta", chosen.variant->dq_path == DqPath::kOneCta);
  plan.decide("dq_writing", chosen.dq.writing.enabled);
  plan.decide("preparation", chosen.preparation.ahead > 0);
  if (params.forward.mask.data != nullptr) {
    plan.decide("mask", mask_name(plans, params.forward));
    plan.decide("if_band", plans.has_band() ? plans.of_band.variant->name : "none");
    if (params.dmask == nullptr) plan.decide("if_bits", plans.has_bits() ? plans.of_bits.variant->name : "none");
  }
  if (params.dmask != nullptr) plan.decide("dmask", dmask_name(chosen.extended));
  return plan;
}

void launch(const BackwardParams& params, const DeviceInfo& device, void* stream) {
  launch_plans(choose_plans(params, device), params, device, static_cast<cudaStream_t>(stream));
}

}  // namespace

const BackwardKernel kKernel = {"sm90", refuses, plan, launch};

}  // namespace flash_attn::cuda::sm90::backward
