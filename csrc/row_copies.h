// Copies of rows, turned by rotary embeddings on the way or not: into a cache, or into a tensor like the first; and out
// of a cache.
#pragma once

#include "float8.h"
#include "params.h"
#include "sequence.h"

namespace flash_attn {

/// Rotary embeddings (Su et al. 2021, section 3.4): columns x1 and x2 of a row at position t become
/// (x1 cos[t, j] - x2 sin[t, j], x1 sin[t, j] + x2 cos[t, j]). The pair is columns j and j + pairs, or 2j and 2j + 1.
struct Rotary {
  const void* cos = nullptr;  // (positions, pairs); null: nothing turns
  const void* sin = nullptr;
  DType dtype = DType::kOther;  // that of the rows, or kFloat32
  int64_t cos_stride = 0, sin_stride = 0;
  int64_t positions = 0, pairs = 0;
  bool interleaved = false;
  bool conjugate = false;  // turns back

  FLASH_ATTN_HOST_DEVICE bool exists() const { return cos != nullptr; }
};

struct RowCopy {
  TensorView from, to;
  int64_t heads = 0, columns = 0;
  bool turned = false;
};

/// Row i of sequence b stands at position offset + offsets[b] + step * i, and in a cache is that row of it. Rows
/// that a cache has no place for are left out; positions beyond the tables count as their last.
struct RowCopies {
  static constexpr int kMaxCopies = 2;
  RowCopy copies[kMaxCopies];
  int count = 0;
  DType dtype = DType::kOther;
  int64_t batch = 0, rows = 0;  // with cu_seqlens 1 and all rows
  Rotary rotary;

  int64_t offset = 0, step = 1;
  const int32_t* offsets = nullptr;     // (batch); null: 0
  const int32_t* cu_seqlens = nullptr;  // (sequences + 1): rows after the last sequence are not turned
  int64_t sequences = 0;

  CacheView cache;         // where `to` is one
  int64_t capacity = 0;    // rows of a sequence in it
  bool to_float8 = false;  // `to` are, and hold multiples of the descales
  Descale descales[kMaxCopies];
};

/// Where a row comes from, what it is turned by, and where it goes.
struct RowPlace {
  int64_t position;  // -1: it is not turned
  int64_t entry;     // of `from`: batch
  int64_t row;       // in `from`
  bool exists;       // in `to`
};

FLASH_ATTN_HOST_DEVICE RowPlace row_place(const RowCopies& p, int64_t b, int64_t row) {
  RowPlace place{0, b, row, true};
  int64_t sequence = b, in_sequence = row;
  if (p.cu_seqlens != nullptr) {
    int64_t low = 0, high = p.sequences;  // cu_seqlens[low] <= row, and cu_seqlens[high] > row or beyond the end
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (p.cu_seqlens[middle] <= row ? low : high) = middle;
    }
    if (p.sequences == 0 || row < p.cu_seqlens[0] || row >= p.cu_seqlens[p.sequences]) {
      place.position = -1;
      return place;
    }
    sequence = low;
    in_sequence = row - p.cu_seqlens[low];
  }
  place.position = p.offset + p.step * in_sequence + (p.offsets != nullptr ? p.offsets[sequence] : 0);
  if (p.cache.exists()) place.exists = place.position >= 0 && place.position < p.capacity;
  return place;
}

/// Elements from the start of `to` to a row that exists there, of the first head.
FLASH_ATTN_HOST_DEVICE int64_t destination(const RowCopies& p, const TensorView& to, int64_t b, const RowPlace& place) {
  if (!p.cache.exists()) return place.entry * to.batch + place.row * to.row;
  return key_rows(p.cache, b).offset(to, place.position);
}

/// Copies of the rows that the sequences of a problem over a cache use, in their order and from row 0 on.
struct KeyGather {
  ForwardParams problem;
  TensorView k, v;             // to: (batch, seqlen_k, num_heads_k, head_dim and head_dim_v), contiguous
  int32_t* lengths = nullptr;  // (batch), to: rows that a sequence has; null: nobody asks

  // Kernels multiply whole blocks of keys, at most so many, with probabilities of 0 where a key is not seen.
  static constexpr int64_t kWidestBlock = 256;
};

/// Rows of sequence b that are copied, counted from the first that takes part: those before no query's window reaches.
/// `s` is its cached_sequence_info().
FLASH_ATTN_HOST_DEVICE Range gathered_rows(const ForwardParams& p, const SequenceInfo& s) {
  if (s.seqlen_q <= 0) return {0, 0};
  const int64_t first = visible_columns(p, s, 0).begin - KeyGather::kWidestBlock;
  return {clamp<int64_t>(first, 0, s.seqlen_k), s.seqlen_k};
}

/// The row of cos and sin for a position.
FLASH_ATTN_HOST_DEVICE int64_t table_row(const Rotary& rotary, int64_t position) {
  return clamp<int64_t>(position, 0, rotary.positions - 1);
}

}  // namespace flash_attn
