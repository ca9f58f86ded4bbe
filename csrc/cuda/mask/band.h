// Whether a packed attn_mask is a band (MaskBand): then kernels that know causal order and windows do.
#pragma once

#include <cuda_runtime_api.h>

#include "../../mask_band.h"
#include "packed_mask.h"

namespace flash_attn::cuda::mask {

using namespace flash_attn::mask;

struct MaskAndBand {
  PackedMask packed;
  MaskBand* band;  // null: see has_band()
};

/// The mask and its band as they were packed before; or packs it into packing_workspace(view) + band_workspace(view)
/// bytes at `workspace`, and finds its band from its classes and the bits of its partial cells. The last kernel that
/// this launches lets the next one start early (dependent_launch.h).
MaskAndBand pack_with_band(const MaskView& view, void* workspace, cudaStream_t stream);

/// Of scratch that a pass needs behind that of the packed mask: none if it was packed before.
inline int64_t band_workspace(const MaskView& view) { return view.packed != nullptr ? 0 : kBandBytes; }

}  // namespace flash_attn::cuda::mask
