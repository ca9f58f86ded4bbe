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

/// Which P of one warp's fragments dropout keeps, of kNTiles fragments side by side, as bits: to be drawn where
/// registers are free.
template <int kNTiles>
struct KeptFragments {
  static_assert(kNTiles % 8 == 0);
  uint32_t bits[kNTiles / 8];  // 2 (n % 8) + i / 2 + 16 (i % 2)

  FLASH_ATTN_DEVICE void draw(const Dropout& dropout, int64_t batch_head, const FragmentPlace& at) {
    const int t = int(threadIdx.x) % 4;
    const int col = at.col - 2 * t;
    // Sixteen bits are kept from `threshold` on: with this added, from 2^31 on, a bit above them.
    const uint32_t carry = (65536u - dropout.threshold) << 15;
#pragma unroll
    for (int c = 0; c < kNTiles / 8; ++c) {
      // Lane t draws block 4 g + t of each row: of what it needs itself a quarter.
      Philox4 random[2][2];
#pragma unroll
      for (int g = 0; g < 2; ++g)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          random[g][r] = dropout.block(batch_head, at.row + 8 * r, col + 64 * c + 32 * g + 8 * t);
        }
      // Bit 16 h + 8 g + 2 j + r: half h of word j, which is for lane j.
      uint32_t x = 0;
#pragma unroll
      for (int bit = 31; bit >= 0; --bit) {
        const uint32_t word = random[bit / 8 % 2][bit % 2].word[bit / 2 % 4];
        const uint32_t sixteen = bit / 16 == 0 ? (word & 0xffffu) << 15 : word >> 1;
        x = __funnelshift_l(sixteen + carry, x, 1);
      }
      bits[c] = transpose_quad_pairs(x);
    }
  }

  /// P as the A operand of P V.
  FLASH_ATTN_DEVICE void apply(uint32_t (&p)[2 * kNTiles]) const {
#pragma unroll
    for (int c = 0; c < kNTiles / 8; ++c) {
#pragma unroll
      for (int bit = 0; bit < 8; ++bit) {
        // The bits of pairs `bit` and `bit` + 8 become signs of bytes, which prmt spreads over halves of words.
        const uint32_t x = bits[c] << (7 - bit);
        p[16 * c + bit] &= permute_bytes<0xaa88>(x);
        p[16 * c + 8 + bit] &= permute_bytes<0xbb99>(x);
      }
    }
  }

 private:
  /// In each byte of the word: pair of bits j of lane t goes to lane j's pair t.
  FLASH_ATTN_DEVICE static uint32_t transpose_quad_pairs(uint32_t x) {
    const int t = int(threadIdx.x) % 4;
    const auto exchange = [&](int step, uint32_t of_lower, int shift) {
      const bool upper = (t & step) != 0;
      const uint32_t other = __shfl_xor_sync(~0u, x, step), mine = upper ? ~of_lower : of_lower;
      x = (x & mine) | (__funnelshift_l(other, other, upper ? 32 - shift : shift) & ~mine);
    };
    exchange(1, 0x33333333u, 2);
    exchange(2, 0x0f0f0f0fu, 4);
    return x;
  }
};

}  // namespace flash_attn::cuda
