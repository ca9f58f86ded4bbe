// The Hopper family's entry: what it takes, its plan, its launch.
#include <initializer_list>

#include "forward_plan.h"
#include "refusals.h"
#include "sm90.h"
#include "tensor_map.h"

namespace flash_attn::sm90 {
namespace {

const char* refuses_tensors(const ForwardParams& p) {
  const ForwardSources sources = forward_sources(p);
  for (const TensorMapSource& source : {sources.q, sources.k, sources.v, sources.out}) {
    if (const char* reason = tensor_map_refuses(source)) return reason;
  }
  return nullptr;
}

const char* refuses(const ForwardParams& given, const DeviceInfo& device) {
  const ForwardParams p = with_true_maxima(given);
  if (const char* reason = refuses_in_both_passes(p, device)) return reason;
  // Tile indices are 32-bit, parts of split tiles included.
  const double tiles = double(p.batch) * double(p.num_heads) * (double(p.seqlen_q) / 128 + 1);
  if (tiles >= double(1 << 27)) return "there are over 2^27 tiles";
  // The running maximum is one of unscaled scores, and -inf times the scale has to stay -inf.
  if (!(p.softmax_scale >= 1e-20 && p.softmax_scale <= 1e6)) return "softmax_scale is not between 1e-20 and 1e6";
  return refuses_tensors(p);
}

Plan plan(const ForwardParams& given, const DeviceInfo& device) {
  const ForwardParams p = with_true_maxima(given);
  ForwardPlan forward_plan = plan_forward(p, device);
  return {forward_plan.variant->name, forward_plan.variant->block_m, forward_plan.variant->block_n,
          place_workspace(forward_plan, p, nullptr)};
}

void launch(const ForwardParams& given, const DeviceInfo& device, void* stream) {
  const ForwardParams p = with_true_maxima(given);
  ForwardPlan forward_plan = plan_forward(p, device);
  place_workspace(forward_plan, p, p.workspace);
  const ForwardVariant& variant = *forward_plan.variant;
  const auto launch_variant = p.dtype == DType::kBFloat16 ? variant.launch_bf16 : variant.launch_fp16;
  launch_variant(p, forward_plan, static_cast<cudaStream_t>(stream));
}

}  // namespace

const ForwardKernel kForward = {"sm90", refuses, plan, launch};

}  // namespace flash_attn::sm90
