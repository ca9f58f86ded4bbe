// What neither pass of the family takes, whatever its kernels, and what both ask of attn_mask.
#pragma once

#include <algorithm>

#include "../../kernel.h"
#include "../mask/packed_mask.h"
#include "code.h"

namespace flash_attn::cuda::sm80 {

constexpr int64_t kMaxRows = int64_t{1} << 27;  // of a sequence, so that places and differences of rows stay in 32 bits
constexpr double kMaxTiles = double(1 << 30);   // of a launch, likewise

/// Null: nothing speaks against it. `archs`: what the family was compiled for, see has_code_for().
inline const char* refuses_problem(const ForwardParams& p, const DeviceInfo& device, const char* archs) {
  if (p.cache.exists()) return "k and v lie in a cache";
  if (device.compute_capability < 80) return "the device is older than compute capability 8.0";
  if (!has_code_for(device.compute_capability, archs)) {
    return "this build has no code of the family for the device's compute capability";
  }
  if (p.dtype == DType::kFloat64) return "the dtype is float64";
  if (p.head_dim > 512 || p.head_dim_v > 512) return "head_dim is over 512";
  if (p.seqlen_q >= kMaxRows || p.seqlen_k >= kMaxRows) return "a sequence is of over 2^27 rows";
  return nullptr;
}

/// Whether attn_mask is read once before the kernels of a pass.
inline bool packs_mask(const ForwardParams& params) { return mask::is_read_ahead(params, 4); }

inline const char* refuses_forward_tiles(const ForwardParams& p) {
  const bool many = double(p.batch) * double(p.num_heads) * (double(p.seqlen_q) / 64 + 1) >= kMaxTiles;
  return many ? "there are over 2^30 tiles" : nullptr;
}

inline const char* refuses_backward_tiles(const ForwardParams& p) {
  if (p.batch == 0 || p.num_heads == 0 || p.head_dim == 0 || p.head_dim_v == 0 || p.seqlen_q == 0 || p.seqlen_k == 0 ||
      p.total_q == 0 || p.total_k == 0) {
    return "a tensor is empty";
  }
  const double heads = double(p.batch) * double(p.num_heads);
  const bool many = heads * (double(std::max(p.seqlen_q, p.seqlen_k)) / 32 + 2) >= kMaxTiles;
  return many ? "there are over 2^30 tiles" : nullptr;
}

}  // namespace flash_attn::cuda::sm80
