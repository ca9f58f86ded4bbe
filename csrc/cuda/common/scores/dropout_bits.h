// Dropout on one warp's accumulator fragments, drawn as bits ahead of P; see scores.h for what a fragment is.
#pragma once

#include "../../../philox.h"
#include "../ptx.h"
#include "scores.h"

namespace flash_attn::cuda {

/// Bytes of x picked by the nibbles of kSelector; with its upper bit set, the byte's sign throughout (PTX ISA, "prmt").
template <uint32_t kSelector>
FLASH_ATTN_DEVICE uint32_t permute_bytes(uint32_t x) {
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "n"(kSelector));
  return y;
}

/// Lanes whose numbers differ in bit kLaneBit, and bits of their words whose numbers differ in bit kBit, change places:
/// what a lane has for the other goes there.
template <int kLaneBit, int kBit>
FLASH_ATTN_DEVICE uint32_t exchange_bits(uint32_t x, int lane) {
  constexpr int kShift = 1 << kBit;
  const bool upper = (lane >> kLaneBit & 1) != 0;
  const uint32_t other = __shfl_xor_sync(~0u, x, 1 << kLaneBit);
  if constexpr (kShift == 16) return __byte_perm(x, other, upper ? 0x3276 : 0x5410);
  if constexpr (kShift == 8) return __byte_perm(x, other, upper ? 0x3715 : 0x6240);
  constexpr uint32_t kLower = ~0u / ((1u << kShift) + 1);  // bits of even multiples of kShift
  const uint32_t mine = upper ? ~kLower : kLower;
  return (x & mine) | (__funnelshift_l(other, other, upper ? 32 - kShift : kShift) & ~mine);
}

/// Which of one warp's scores dropout keeps, of blocks of 16 x 16 that are kTileRows x kTileCols of a fragment's
/// rows and columns, as bits: to be drawn where registers are free. The rows of a fragment, eight of which lie across
/// lanes, are queries in forward and keys in backward (kKeysAreRows).
///
/// 32 groups (Dropout) are four blocks, and each lane draws one: of the eight of a block that which its own scores
/// belong to, of the blocks that which two bits of its number say. Four lanes then have each other's scores.
template <bool kKeysAreRows, int kTileRows, int kTileCols>
struct KeptScores {
  static constexpr int kBlocks = kTileRows * kTileCols, kWords = (kBlocks + 3) / 4;
  uint32_t bits[kWords];

  FLASH_ATTN_DEVICE void set_all() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) bits[w] = ~0u;
  }

  /// (row, col): of the warp's first score, as query and key, multiples of 16.
  FLASH_ATTN_DEVICE void draw_own(const Dropout& dropout, int64_t batch_head, int row, int col, int lane) {
    const int g = lane / 4, t = lane % 4;
    const int low = kKeysAreRows ? g / 2 % 2 : t % 2, high = g % 2;  // of the number of the block that the lane draws
    row += kKeysAreRows ? 2 * t : g;
    col += kKeysAreRows ? g : 2 * t;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int block = min(4 * w + 2 * high + low, kBlocks - 1), m = block / kTileCols, n = block % kTileCols;
      Dropout own = dropout;
      asm volatile("" : "+r"(own.digits));  // its masks are worked out where they are used: not worth sixteen registers
      bits[w] = own.draw(batch_head, row + 16 * (kKeysAreRows ? n : m), col + 16 * (kKeysAreRows ? m : n));
    }
  }
  /// What the lanes have drawn goes to those that have the scores.
  FLASH_ATTN_DEVICE void exchange(int lane) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      // Bits of a score's number in its group: column 0, row 0, column 1, column 3, row 3.
      bits[w] = kKeysAreRows ? exchange_bits<3, 2>(exchange_bits<2, 4>(bits[w], lane), lane)
                             : exchange_bits<0, 2>(exchange_bits<2, 3>(bits[w], lane), lane);
    }
  }
  FLASH_ATTN_DEVICE void draw(const Dropout& dropout, int64_t batch_head, int row, int col, int lane) {
    draw_own(dropout, batch_head, row, col, lane);
    exchange(lane);
  }

  /// Of accumulator i of the fragment of row tile m (of 16) and column tile n (of 8).
  FLASH_ATTN_DEVICE bool hold(int m, int n, int i) const {
    const int block = m * kTileCols + n / 2, high = block / 2 % 2, low = block % 2;
    const int bit = kKeysAreRows ? 16 * high + 8 * (i % 2) + 4 * low + 2 * (i / 2) + n % 2
                                 : 16 * (i % 2) + 8 * high + 4 * low + 2 * (n % 2) + i / 2;
    return (bits[block / 4] & 1u << bit) != 0;
  }
};

/// Of kMTiles x kNTiles fragments, for P as the A operand of P V.
template <int kMTiles, int kNTiles>
struct KeptFragments : KeptScores<false, kMTiles, kNTiles / 2> {
  static_assert(kNTiles % 4 == 0);

  /// Ones in the halves of word `pair` of row tile m that are kept.
  FLASH_ATTN_DEVICE uint32_t mask(int m, int pair) const {
    // The bits of eight pairs, of two blocks, are bytes of either half of a word. Those of one pair become signs of
    // bytes, which prmt spreads over halves of words.
    const int eight = m * (kNTiles / 4) + pair / 8;
    const uint32_t x = this->bits[eight / 2] << (7 - pair % 8);
    return eight % 2 == 0 ? permute_bytes<0xaa88>(x) : permute_bytes<0xbb99>(x);
  }
};

/// P of what dropout takes away becomes 0.
template <int kMTiles, int kNTiles>
FLASH_ATTN_DEVICE void apply_dropout(float (&p)[kMTiles][kNTiles][4], const Dropout& dropout, int64_t batch_head,
                                     const FragmentPlace& at) {
  const int lane = int(threadIdx.x) % 32;
  KeptScores<false, kMTiles, kNTiles / 2> kept;
  kept.draw(dropout, batch_head, at.row - lane / 4, at.col - lane % 4 * 2, lane);
#pragma unroll
  for (int m = 0; m < kMTiles; ++m)
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) p[m][n][i] = kept.hold(m, n, i) ? p[m][n][i] : 0.f;
}

}  // namespace flash_attn::cuda
