// The family's backward entry: what it takes, its plan, its launch.
#include <algorithm>

#include "../code_for_device.h"
#include "../sm80.h"
#include "plan.h"

namespace flash_attn::cuda::sm80 {
namespace {

constexpr int64_t kMaxRows = int64_t{1} << 27;  // so that places and differences of rows stay in 32 bits

/// A maximum beyond the packed tensor itself says nothing.
BackwardParams with_true_maxima(BackwardParams params) {
  ForwardParams& p = params.forward;
  if (p.is_varlen_q()) p.seqlen_q = std::min(p.seqlen_q, p.total_q);
  if (p.is_varlen_k()) p.seqlen_k = std::min(p.seqlen_k, p.total_k);
  return params;
}

const char* refuses(const BackwardParams& given, const DeviceInfo& device) {
  const BackwardParams params = with_true_maxima(given);
  const ForwardParams& p = params.forward;
  if (device.compute_capability < 80) return "the device is older than compute capability 8.0";
  if (!has_code_for(device.compute_capability, FLASH_ATTN_SM80_ARCHS)) {
    return "this build has no code of the family for the device's compute capability";
  }
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) return "the dtype is neither bfloat16 nor float16";
  if (p.batch == 0 || p.num_heads == 0 || p.head_dim == 0 || p.head_dim_v == 0 || p.seqlen_q == 0 || p.seqlen_k == 0 ||
      p.total_q == 0 || p.total_k == 0) {
    return "a tensor is empty";
  }
  if (p.mask.data != nullptr && p.mask.dtype == DType::kFloat64) return "attn_mask is of float64";
  if (p.head_dim > 256 || p.head_dim_v > 256) return "head_dim is over 256";
  if (p.seqlen_q >= kMaxRows || p.seqlen_k >= kMaxRows) return "a sequence is of over 2^27 rows";
  const double heads = double(p.batch) * double(p.num_heads);
  if (heads * (double(p.seqlen_q) / 32 + 2) >= double(1 << 30) ||
      heads * (double(p.seqlen_k) / 32 + 2) >= double(1 << 30)) {
    return "there are over 2^30 tiles";
  }
  if (plan_backward(params, device).variant == nullptr)
    return "no kernel of this head dimension does what is asked for";
  return nullptr;
}

Plan plan(const BackwardParams& given, const DeviceInfo& device) {
  const BackwardPlan chosen = plan_backward(with_true_maxima(given), device);
  return {chosen.variant->name, chosen.variant->block_m, chosen.variant->block_n, chosen.workspace_bytes};
}

void launch(const BackwardParams& given, const DeviceInfo& device, void* stream) {
  const BackwardParams params = with_true_maxima(given);
  launch_backward(plan_backward(params, device), params, static_cast<cudaStream_t>(stream));
}

}  // namespace

extern const BackwardKernel kBackward = {"sm80", refuses, plan, launch};

}  // namespace flash_attn::cuda::sm80
