// What neither pass of the Hopper family takes, and what both ask of attn_mask. Host code.
#pragma once

#include "../../kernel.h"

namespace flash_attn::cuda::sm90 {

constexpr int64_t kLeastSharing = 8;  // of mask::is_read_ahead()

/// Why, as a clause; null if it is for the pass to say.
inline const char* refuses_in_both_passes(const ForwardParams& p, const DeviceInfo& device) {
  if (device.compute_capability != 90) return "the device is not of compute capability 9.0";
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16)
    return "the dtype is neither bfloat16, float16 nor float32";
  if (p.batch == 0 || p.num_heads == 0 || p.seqlen_q == 0 || p.seqlen_k == 0 || p.head_dim == 0 || p.head_dim_v == 0 ||
      p.total_q == 0 || p.total_k == 0) {
    return "a tensor is empty";
  }
  if (p.head_dim > 256 || p.head_dim_v > 256) return "head_dim is over 256";
  if (p.head_dim % 8 != 0 || p.head_dim_v % 8 != 0) return "head_dim is not a multiple of 8";
  if (p.cache.exists()) return "k and v lie in a cache";
  return nullptr;
}

}  // namespace flash_attn::cuda::sm90
