// What the host hands to the forward kernel.
#pragma once

#include <cuda.h>

#include "../../../mask_kind.h"
#include "../../common/tiles/schedule.h"
#include "../hopper/tensor_map.h"

namespace flash_attn::cuda::sm90::forward {

/// Of a kernel whose clusters put parts of tiles together: what the CTAs send each other, in pieces of a warp's 16
/// rows. The CTA that puts most of the eight warps' rows together gets ceil(8 / parts) * (parts - 1) of them.
constexpr int kPartSlots = 8;
constexpr bool have_slots(int parts) { return (8 + parts - 1) / parts * (parts - 1) <= kPartSlots; }

/// The four tensors of a problem.
struct Sources {
  TensorMapSource q, k, v, out;
};

inline Sources sources(const ForwardParams& p) {
  return {query_rows(p, p.q, p.head_dim), key_rows(p, p.k, p.num_heads_k, p.head_dim),
          key_rows(p, p.v, p.num_heads_k, p.head_dim_v), query_rows(p, p.out, p.head_dim_v)};
}

struct KernelParams {
  CUtensorMap q, k, v, out;  // see tensor_map.h
  ForwardParams problem;
  TileSchedule schedule;
  // Of a score as kernels keep it, q.k as a rule.
  float to_natural, to_log2;
  int panels, panels_v;  // of 64 columns that q and k, and v and out have
  uint64_t launch_id;    // no other launch's, see open_counter()
};

/// Of a kernel that does what attn_mask says if it is a band, and nothing if it is not.
struct BandParams : KernelParams {
  const mask::MaskKind* band;  // of `problem`, which has no mask
};

}  // namespace flash_attn::cuda::sm90::forward
