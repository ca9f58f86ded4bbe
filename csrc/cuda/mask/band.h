// Whether a packed attn_mask is a band (MaskBand): then kernels that know causal order and windows do.
#pragma once

#include <cuda_runtime_api.h>

#include "../../mask_band.h"

namespace flash_attn::cuda::mask {

using namespace flash_attn::mask;

/// Writes the band of a mask for which has_band() holds, kBandBytes of them, from its classes and the bits of its
/// partial cells.
void find_band(const MaskView& view, const PackedMask& packed, MaskBand* band, cudaStream_t stream);

/// Of scratch that a pass needs behind that of the packed mask: none if it was packed before.
inline int64_t band_workspace(const MaskView& view) { return view.packed != nullptr ? 0 : kBandBytes; }

/// The band as it was found before, or finds it, in what is behind the packed mask at `workspace`.
inline MaskBand* found_or_find_band(const MaskView& view, const PackedMask& packed, void* workspace,
                                    cudaStream_t stream) {
  if (view.packed != nullptr) return place_band(view, view.packed);
  MaskBand* const band = place_band(view, workspace);
  find_band(view, packed, band, stream);
  return band;
}

}  // namespace flash_attn::cuda::mask
