// A packed attn_mask with its kind (MaskKind): of a band, kernels that know causal order and windows do, and of an
// additive mask that only hides, those of boolean masks.
#pragma once

#include <cuda_runtime_api.h>

#include "../../mask_kind.h"
#include "packed_mask.h"

namespace flash_attn::cuda::mask {

using namespace flash_attn::mask;

struct KnownMask {
  PackedMask packed;
  MaskKind* kind;
  uint32_t mark;

  /// Of kernels that read bits, where others may see to a band, and others to values.
  KindCondition only_hides(bool with_band) const {
    return {with_band ? &kind->band_or_biased : &kind->biased, mark, false};
  }
  /// Of kernels that do whatever is left: values, or bits if no others read them.
  KindCondition others(bool with_bits) const {
    return with_bits ? KindCondition{&kind->biased, mark, true} : no_band();
  }

 private:
  KindCondition no_band() const { return {&kind->is_band, 1, false}; }
};

/// The mask and its kind as they were packed before; or packs it into packing_workspace(view) + kind_workspace(view)
/// bytes at `workspace` and, if `looks`, finds its band, where that may have one, from its classes and the bits of its
/// partial cells. The last kernel that this launches then lets the next one start early (dependent_launch.h).
KnownMask pack_with_kind(const MaskView& view, void* workspace, cudaStream_t stream, bool looks);

/// Packs it into stored_bytes(view) at `data`, to be kept.
void prepare(const MaskView& view, void* data, cudaStream_t stream);

/// Of scratch that a pass needs behind that of the packed mask: none if it was packed before.
inline int64_t kind_workspace(const MaskView& view) { return view.packed != nullptr ? 0 : kKindBytes; }

}  // namespace flash_attn::cuda::mask
