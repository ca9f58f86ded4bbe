// What a packed attn_mask (packed_mask.h) turned out to be, which the host does not know: a band, so causal order or a
// window given as a mask, for which kernels that know these need no bits; or an additive one that adds nothing but 0 to
// what it shows, for which kernels of boolean masks need no values. What is known of it stands behind the packed mask.
#pragma once

#include "packed_mask.h"

namespace flash_attn::mask {

struct MaskKind {
  // Row r sees the columns from r + left to r + right that there are, one at least, and no others. 0: it is another
  // mask, or nobody has looked.
  int32_t is_band;
  int32_t left, right;
  // The mark of whoever packed it, if something other than 0 is added to a score that is seen. Anything else: only 0.
  uint64_t biased;
};

constexpr uint64_t kPreparedMark = 1;  // of masks that are packed to be kept

/// Of kernels that are launched for one kind of mask each, as the host does not know which it is.
struct KindCondition {
  enum Answer : int8_t { kEither, kNo, kYes };

  const MaskKind* kind = nullptr;                 // null: there is no condition
  Answer is_band = kEither, is_biased = kEither;  // what it has to be
  uint64_t mark = 0;                              // of whoever packed it

  FLASH_ATTN_HOST_DEVICE bool exists() const { return kind != nullptr; }
  FLASH_ATTN_HOST_DEVICE bool excludes() const {
    return kind != nullptr && (differs(is_band, kind->is_band != 0) || differs(is_biased, kind->biased == mark));
  }

 private:
  FLASH_ATTN_HOST_DEVICE static bool differs(Answer wanted, bool is) {
    return wanted != kEither && (wanted == kYes) != is;
  }
};

constexpr int64_t kKindBytes = 256;  // with what is added up while a band is looked for

/// Whether it is worth to look for a band: one mask for all batch entries and heads, and not of a few rows.
FLASH_ATTN_HOST_DEVICE bool has_band(const MaskView& view) {
  constexpr int64_t kLeast = 512;  // rows and columns
  return view.batch_size == 1 && view.head_size == 1 && view.row_size >= kLeast && view.col_size >= kLeast;
}

/// Bytes of a packed mask with what is known of it.
FLASH_ATTN_HOST_DEVICE int64_t stored_bytes(const MaskView& view) { return packed_bytes(view) + kKindBytes; }

/// Where that stands, of a packed mask that lies at `data`.
FLASH_ATTN_HOST_DEVICE MaskKind* place_kind(const MaskView& view, void* data) {
  return reinterpret_cast<MaskKind*>(static_cast<char*>(data) + packed_bytes(view));
}

}  // namespace flash_attn::mask
