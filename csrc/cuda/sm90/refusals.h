// What neither pass of the Hopper family takes, and what both ask of attn_mask. Host code.
#pragma once

#include "../../kernel.h"
#include "../../mask_kind.h"
#include "../mask/packed_mask.h"
#include "hopper/tensor_map.h"

namespace flash_attn::cuda::sm90 {

constexpr int64_t kLeastSharing = 8;  // of mask::is_read_ahead()

/// A few blocks a tile, and a few tiles an SM: a launch before the kernels of a pass costs more than it saves them.
inline bool has_few_scores(const ForwardParams& p) {
  return p.seqlen_k <= 512 && p.batch * p.num_heads * p.seqlen_q * p.seqlen_k <= int64_t{1} << 23;
}

/// As mask::is_read_ahead(); but an additive mask of few scores is read by tiles alone.
inline bool is_read_ahead(const ForwardParams& p, int64_t sharing) {
  const bool by_tiles = p.has_bias() && p.mask.packed == nullptr && has_few_scores(p);
  return !by_tiles && mask::is_read_ahead(p, sharing);
}

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

/// Whether attn_mask is all that hides something or changes a score, and may be causal order or a window.
inline bool mask_may_be_band(const ForwardParams& p) {
  const bool has_rules = p.alibi_slopes != nullptr || p.softcap > 0 || p.dropout_p > 0 || p.sinks != nullptr;
  return is_read_ahead(p, kLeastSharing) && mask::has_band(p.mask) && p.is_dense() && !p.has_window() && !has_rules;
}

/// Whether attn_mask is additive, but perhaps only hides.
inline bool mask_may_be_bits(const ForwardParams& p) {
  return p.has_bias() && is_read_ahead(p, kLeastSharing) && p.is_dense();
}

/// The problem for kernels that run if it does: under a boolean mask that was packed before.
inline ForwardParams bits_problem(ForwardParams p) {
  if (p.mask.packed == nullptr) p.mask.packed = p.mask.data;  // wherever it will be
  p.mask.dtype = DType::kBool;
  return p;
}

/// The problem for kernels that run if it is: planned as causal, and what rows see the device finds.
inline ForwardParams band_problem(ForwardParams p) {
  p.mask = MaskView{};
  p.causal = Causal::kTopLeft;
  p.window_right = 0;
  return p;
}

}  // namespace flash_attn::cuda::sm90
