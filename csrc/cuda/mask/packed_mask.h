// Packing attn_mask on the device, see csrc/packed_mask.h for what comes out.
#pragma once

#include <cuda_runtime_api.h>

#include "../../packed_mask.h"

namespace flash_attn::cuda::mask {

using namespace flash_attn::mask;

/// Reads the mask once and packs it into `data`, packed_bytes(view) of them; if it was packed before, copies that.
/// Waits for nothing on the host.
PackedMask pack(const MaskView& view, void* data, cudaStream_t stream);

/// The mask as it was packed before, or packs it into packing_workspace(view) bytes at `workspace`.
inline PackedMask packed_or_pack(const MaskView& view, void* workspace, cudaStream_t stream) {
  return view.packed != nullptr ? place_packed(view, view.packed) : pack(view, workspace, stream);
}

}  // namespace flash_attn::cuda::mask
