// Packing attn_mask on the device, see csrc/packed_mask.h for what comes out.
#pragma once

#include <cuda_runtime_api.h>

#include "../../mask_kind.h"
#include "../../params.h"

namespace flash_attn::cuda::mask {

using namespace flash_attn::mask;

/// Where the kind of a mask goes that is packed; kKindBytes of them.
struct KindPlace {
  MaskKind* kind = nullptr;  // null: nobody asks
  uint32_t mark = 0;         // see MaskKind::biased; is never taken back
  bool looks = false;        // a look for its band begins (band_part.h)
};

/// Reads the mask once and packs it into `data`, packed_bytes(view) of them. Waits for nothing on the host.
PackedMask pack(const MaskView& view, void* data, cudaStream_t stream, const KindPlace& place = {});

/// The mask as it was packed before, or packs it into packing_workspace(view) bytes at `workspace`.
inline PackedMask packed_or_pack(const MaskView& view, void* workspace, cudaStream_t stream) {
  return view.packed != nullptr ? place_packed(view, view.packed) : pack(view, workspace, stream);
}

/// Whether kernels for the problem should have attn_mask packed first: a boolean one always, since bits cost an eighth
/// of its bytes; an additive one where at least `sharing` scores share each of its numbers, so that reading it once
/// more is cheap beside passing over what it hides.
inline bool is_read_ahead(const ForwardParams& p, int64_t sharing) {
  if (p.mask.data == nullptr) return false;
  const int64_t size = p.mask.batch_size * p.mask.head_size * p.mask.row_size * p.mask.col_size;
  return p.mask.packed != nullptr || p.has_bool_mask() ||
         sharing * size <= p.batch * p.num_heads * p.seqlen_q * p.seqlen_k;
}

}  // namespace flash_attn::cuda::mask
