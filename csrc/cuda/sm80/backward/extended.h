// From products to P and dS where a score is more than scale * q.k: softcap, ALiBi, attn_mask, dropout. On transposed
// fragments, see gradients.h.
#pragma once

#include "../../common/scores/dropout_bits.h"
#include "../../common/scores/scores.h"
#include "config.h"
#include "tile.h"

namespace flash_attn::cuda::sm80 {

/// attn_mask from row 0, column 0 of one batch entry and head on.
template <typename Storage>
SM80_DEVICE const Storage* mask_of(const MaskView& mask, int batch, int head) {
  return static_cast<const Storage*>(mask.data) + batch * mask.batch + head * mask.head;
}

SM80_DEVICE float slope_of(const ForwardParams& p, int batch, int head) {
  if (p.alibi_slopes == nullptr) return 0.f;
  return static_cast<const float*>(p.alibi_slopes)[batch * p.alibi_batch_stride + int64_t{head} * p.alibi_head_stride];
}

/// A bit for each of a lane's scores: 8 (2 m + i / 2) + 2 (n % 4) + i % 2 of word n / 4.
template <int kKeyTiles, int kQueryTiles>
struct ScoreBits {
  static constexpr int kWords = (kQueryTiles + 3) / 4;
  uint32_t word[kWords];
  SM80_DEVICE void set_all() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) word[w] = ~0u;
  }
  SM80_DEVICE static constexpr int bit(int m, int n, int i) { return 8 * (2 * m + i / 2) + 2 * (n % 4) + i % 2; }
  SM80_DEVICE bool hold(int m, int n, int i) const { return (word[n / 4] & 1u << bit(m, n, i)) != 0; }
};

/// Numbers of an additive attn_mask for a lane's keys and queries in one column of fragments, as they lie in memory.
template <int kKeyTiles>
struct BiasColumn {
  uint32_t raw[kKeyTiles][4];

  /// `from`: of the lane's first key and the column's first query. What is not `shown` is not read.
  template <typename Storage, typename Shown>
  SM80_DEVICE void load(const void* from, int64_t row_stride, int64_t col_stride, const Shown& shown) {
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        raw[m][i] = 0;
        if (shown(m, i)) {
          raw[m][i] = static_cast<const Storage*>(from)[i % 2 * row_stride + (16 * m + i / 2 * 8) * col_stride];
        }
      }
    }
  }

  template <typename Element>
  SM80_DEVICE float get(int m, int i, bool is_float32) const {
    uint32_t bits = raw[m][i];
    if (!is_float32) {
      if constexpr (std::is_same_v<Element, __half>) {
        bits = __float_as_uint(__half2float(__ushort_as_half(uint16_t(bits))));
      } else {
        bits <<= 16;
      }
    }
    return __uint_as_float(bits);
  }
};

}  // namespace flash_attn::cuda::sm80
