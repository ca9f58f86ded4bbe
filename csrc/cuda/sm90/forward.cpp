// The Hopper family's entry: what it takes, its plan, its launch.
#include <algorithm>
#include <initializer_list>

#include "forward_plan.h"
#include "sm90.h"
#include "tensor_map.h"

namespace flash_attn::sm90 {
namespace {

const char* refuses_sizes(const ForwardParams& p) {
  if (p.batch == 0 || p.num_heads == 0 || p.seqlen_q == 0 || p.seqlen_k == 0 || p.head_dim == 0 || p.head_dim_v == 0 ||
      (p.is_varlen_q() && p.total_q == 0) || (p.is_varlen_k() && p.total_k == 0)) {
    return "a tensor is empty";
  }
  if (p.head_dim > 256 || p.head_dim_v > 256) return "head_dim is over 256";
  if (p.head_dim % 8 != 0 || p.head_dim_v % 8 != 0) return "head_dim is not a multiple of 8";
  // Tile indices are 32-bit, parts of split tiles included.
  const double tiles = double(p.batch) * double(p.num_heads) * (double(p.seqlen_q) / 128 + 1);
  if (tiles >= double(1 << 27)) return "there are over 2^27 tiles";
  return nullptr;
}

const char* refuses_tensors(const ForwardParams& p) {
  const ForwardSources sources = forward_sources(p);
  for (const TensorMapSource& source : {sources.q, sources.k, sources.v, sources.out}) {
    if (const char* reason = tensor_map_refuses(source)) return reason;
  }
  return nullptr;
}

/// A maximum beyond the packed tensor itself says nothing, and would not fit the tensor maps.
ForwardParams with_true_maxima(ForwardParams p) {
  if (p.is_varlen_q()) p.seqlen_q = std::min(p.seqlen_q, p.total_q);
  if (p.is_varlen_k()) p.seqlen_k = std::min(p.seqlen_k, p.total_k);
  return p;
}

const char* refuses(const ForwardParams& given, const DeviceInfo& device) {
  const ForwardParams p = with_true_maxima(given);
  if (device.compute_capability != 90) return "the device is not of compute capability 9.0";
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) return "the dtype is neither bfloat16 nor float16";
  if (const char* reason = refuses_sizes(p)) return reason;
  if (p.mask.data != nullptr) return "there is an attn_mask";
  if (p.alibi_slopes != nullptr) return "there are alibi_slopes";
  if (p.sinks != nullptr) return "there are sinks";
  if (p.softcap != 0) return "there is a softcap";
  if (p.dropout_p != 0) return "there is dropout";
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
