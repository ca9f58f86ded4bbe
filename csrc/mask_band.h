// Whether a packed attn_mask (packed_mask.h) is a band: causal order, or a window, given as a mask. Kernels that know
// these need no bits. What is known of it stands behind the packed mask.
#pragma once

#include "packed_mask.h"

namespace flash_attn::mask {

/// Row r sees the columns from r + left to r + right that there are, one at least, and no others.
struct MaskBand {
  int32_t is_band;  // 0: it is another mask, or nobody has looked
  int32_t left, right;
};

/// Of kernels that are launched both for a band and for another mask, as the host does not know which it is.
struct BandCondition {
  const MaskBand* band = nullptr;  // null: there is no condition
  bool is_band = false;            // what it has to be
  FLASH_ATTN_HOST_DEVICE bool excludes() const { return band != nullptr && (band->is_band != 0) != is_band; }
};

constexpr int64_t kBandBytes = 256;  // with what is added up while it is looked for

/// Whether it is worth to look: one mask for all batch entries and heads, and not of a few rows.
FLASH_ATTN_HOST_DEVICE bool has_band(const MaskView& view) {
  constexpr int64_t kLeast = 512;  // rows and columns
  return view.batch_size == 1 && view.head_size == 1 && view.row_size >= kLeast && view.col_size >= kLeast;
}

/// Bytes of a packed mask with what is known of its band.
FLASH_ATTN_HOST_DEVICE int64_t stored_bytes(const MaskView& view) {
  return packed_bytes(view) + (has_band(view) ? kBandBytes : 0);
}

/// Where it stands, of a packed mask that lies at `data`; null if it has none.
FLASH_ATTN_HOST_DEVICE MaskBand* place_band(const MaskView& view, void* data) {
  return has_band(view) ? reinterpret_cast<MaskBand*>(static_cast<char*>(data) + packed_bytes(view)) : nullptr;
}

}  // namespace flash_attn::mask
