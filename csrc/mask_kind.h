// What a packed attn_mask (packed_mask.h) turned out to be, which the host does not know: a band, so causal order or a
// window given as a mask, for which kernels that know these need no bits; or an additive one that adds nothing but 0 to
// what it shows, for which kernels of boolean masks need no values. What is known of it stands behind the packed mask.
#pragma once

#include "packed_mask.h"

namespace flash_attn::mask {

struct MaskKind {
  // 1: row r sees the columns from r + left to r + right that there are, one at least, and no others; and there is no
  // column that no row sees. 0: it is another mask, or nobody has looked.
  uint32_t is_band;
  int32_t left, right;
  // The mark of whoever packed it, if something other than 0 is added to a score that is seen; anything else: only 0.
  uint32_t biased;
  uint32_t band_or_biased;  // the same mark, if it is either; where a band was looked for
};

constexpr uint32_t kPreparedMark = 1;  // of masks that are packed to be kept

/// Of kernels that are launched for one kind of mask each, as the host does not know which it is. It is looked at in
/// each of them, so it is short.
struct KindCondition {
  const uint32_t* word = nullptr;  // of a MaskKind; null: there is no condition
  uint32_t mark = 0;
  bool is_mark = false;  // what the word has to be, or must not be

  static KindCondition is_band(const MaskKind& kind) { return {&kind.is_band, 1, true}; }
  bool exists() const { return word != nullptr; }
  FLASH_ATTN_HOST_DEVICE bool excludes() const { return word != nullptr && (*word == mark) != is_mark; }
  /// Where the condition is that it is one.
  FLASH_ATTN_HOST_DEVICE const MaskKind& band() const { return *reinterpret_cast<const MaskKind*>(word); }
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
