#pragma once

#include "../../kernel.h"
#include "variant.h"

namespace flash_attn::cuda::decode {

struct DecodePlan {
  const Variant* variant = nullptr;  // null: none fits into shared memory
  int stages = 0, ctas = 0;
  int cluster = 1;  // CTAs; over 1, as many clusters have each tile
  int64_t shared_bytes() const { return variant->fixed_bytes + int64_t{stages} * variant->stage_bytes; }
  int64_t arrivals_bytes() const { return (int64_t{8} * ctas + 127) / 128 * 128; }
  int64_t workspace_bytes() const { return arrivals_bytes() + ctas * variant->partial_bytes(); }
};

constexpr int64_t kMaxHeadDim = 256;  // where values are not a part of the keys

/// Values are the first columns of the keys, which are wider than what other kernels take, and there is a kernel for
/// it.
bool is_latent(const ForwardParams& p, const DeviceInfo& device, bool float8);

DecodePlan plan_decode(const ForwardParams& p, const DeviceInfo& device, bool float8);

/// Of all sequences and heads.
int64_t tiles_of(const ForwardParams& p, const Variant& variant);

/// Units of all sequences together, at most: see units.h.
double max_units(const ForwardParams& p, const Variant& variant);

}  // namespace flash_attn::cuda::decode
