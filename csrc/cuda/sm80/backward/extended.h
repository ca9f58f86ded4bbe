// From products to P and dS where a score is more than scale * q.k: softcap, ALiBi, attn_mask, dropout. On transposed
// fragments, see gradients.h.
#pragma once

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
  static constexpr int kWords = (kQueryTiles + 3) / 4, kCombinations = kQueryTiles < 4 ? 2 * kQueryTiles : 8;
  uint32_t word[kWords];
  SM80_DEVICE void set_all() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) word[w] = ~0u;
  }
  SM80_DEVICE static constexpr int bit(int m, int n, int i) { return 8 * (2 * m + i / 2) + 2 * (n % 4) + i % 2; }
  SM80_DEVICE bool hold(int m, int n, int i) const { return (word[n / 4] & 1u << bit(m, n, i)) != 0; }
};

/// In each byte of the word, bit j of lane 4 g + t goes to lane 4 j + t's bit g.
SM80_DEVICE uint32_t transpose_bytes(uint32_t x, int g) {
  const auto exchange = [&](int step, uint32_t of_lower) {
    const bool upper = (g & step) != 0;
    const uint32_t other = __shfl_xor_sync(~0u, x, 4 * step);
    x = upper ? (x & ~of_lower) | (other >> step & of_lower) : (x & of_lower) | (other << step & ~of_lower);
  };
  exchange(1, 0x55555555u);
  exchange(2, 0x33333333u);
  exchange(4, 0x0f0f0f0fu);
  return x;
}

/// A Philox block serves eight neighbouring keys of a query row: those of a quad's four rows of lanes. Lane 4 g + t
/// draws those of query 8 n + 2 t + c, of which g numbers the pairs (n, c), and then the lanes of equal t exchange()
/// them as bits.
template <int kKeyTiles, int kQueryTiles>
SM80_DEVICE void draw_own(ScoreBits<kKeyTiles, kQueryTiles>& kept, const Dropout& dropout, int64_t batch_head, int row,
                          int col, uint32_t lane) {
  using Bits = ScoreBits<kKeyTiles, kQueryTiles>;
  constexpr int kHalves = 2 * kKeyTiles;  // groups of eight keys
  constexpr int kPerLane = kHalves * Bits::kCombinations / 8;
  static_assert(Bits::kCombinations == 8 || Bits::kCombinations == 4);
  const int g = int(lane / 4), t = int(lane % 4), pair = g % Bits::kCombinations;
  const int first_half = g / Bits::kCombinations * kPerLane;
  // Sixteen bits are kept from `threshold` on: with this added, from 2^31 on, a bit above them.
  const uint32_t carry = (65536u - dropout.threshold) << 15;
#pragma unroll
  for (int w = 0; w < Bits::kWords; ++w) {
    Philox4 random[kPerLane];  // at a time, for each alone would wait for its rounds
#pragma unroll
    for (int half = 0; half < kPerLane; ++half) {
      random[half] =
          dropout.block(batch_head, row + 32 * w + pair / 2 * 8 + 2 * t + pair % 2, col + 8 * (first_half + half));
    }
    uint32_t x = 0;  // bit 8 half + i: of key i
#pragma unroll
    for (int bit = 8 * kPerLane - 1; bit >= 0; --bit) {
      const uint32_t word = random[bit / 8].word[bit / 2 % 4];
      const uint32_t sixteen = bit % 2 == 0 ? (word & 0xffffu) << 15 : word >> 1;
      x = __funnelshift_l(sixteen + carry, x, 1);
    }
    kept.word[w] = x;
  }
}

/// What the lanes have drawn goes to those that have the scores.
template <int kKeyTiles, int kQueryTiles>
SM80_DEVICE void exchange(ScoreBits<kKeyTiles, kQueryTiles>& kept, uint32_t lane) {
  using Bits = ScoreBits<kKeyTiles, kQueryTiles>;
  constexpr int kPerLane = 2 * kKeyTiles * Bits::kCombinations / 8;
#pragma unroll
  for (int w = 0; w < Bits::kWords; ++w) {
    uint32_t x = transpose_bytes(kept.word[w], int(lane / 4));
    if constexpr (Bits::kCombinations == 4) {  // a byte's upper half is of the halves that lanes from 16 on drew
      constexpr uint32_t kLower = kPerLane == 2 ? 0x0f0fu : 0x0fu;
      x = (x & kLower) | (x >> 4 & kLower) << (8 * kPerLane);
    }
    kept.word[w] = x;
  }
}

/// Both.
template <int kKeyTiles, int kQueryTiles>
SM80_DEVICE void draw(ScoreBits<kKeyTiles, kQueryTiles>& kept, const Dropout& dropout, int64_t batch_head, int row,
                      int col, uint32_t lane) {
  draw_own(kept, dropout, batch_head, row, col, lane);
  exchange(kept, lane);
}

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
