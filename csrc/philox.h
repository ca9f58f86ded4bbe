// Dropout's random numbers: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, section
// 3.3): seven rounds are the fewest that pass BigCrush (table 2 there). The key is the seed; the counter is the place
// of the scores in their head. So every kernel draws the same mask, whatever its tiles and its order.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace flash_attn {

struct Philox4 {
  uint32_t word[4];
};

constexpr int kPhiloxRounds = 7;

/// Counters in, random words out, of two blocks: the rounds of one hide the latency of the other's. kRolled: on a GPU
/// the rounds stay a loop, for kernels that have no registers left.
template <bool kRolled = false>
FLASH_ATTN_HOST_DEVICE void philox4x32(Philox4 (&blocks)[2], uint32_t k0, uint32_t k1) {
  int rounds = kPhiloxRounds;
#ifdef __CUDA_ARCH__
  if constexpr (kRolled) asm volatile("" : "+r"(rounds));
#endif
  for (int round = 0; round < rounds; ++round) {
    for (Philox4& block : blocks) {
      uint32_t (&c)[4] = block.word;
      const uint64_t product0 = uint64_t{0xD2511F53u} * c[0];
      const uint64_t product1 = uint64_t{0xCD9E8D57u} * c[2];
      c[0] = uint32_t(product1 >> 32) ^ c[1] ^ k0;
      c[1] = uint32_t(product1);
      c[2] = uint32_t(product0 >> 32) ^ c[3] ^ k1;
      c[3] = uint32_t(product0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

/// One call's dropout. A score is kept when its sixteen random digits, as a number, are at least a threshold; what is
/// kept is multiplied by `scale`, one over the share kept.
///
/// Scores (row, col), counted from the start of their sequence, are drawn by groups of 32: a group has, of sixteen rows
/// and columns, two neighbouring rows and those eight below them, and four neighbouring columns and those eight to
/// their right. So a block of 16 x 16 scores is eight whole groups, whichever of rows and columns a kernel has in lanes
/// and whichever in registers. A group has two Philox blocks, of counters
///
///     (4 (col / 16) + 2 (col / 4 % 2) + {0, 1}, 4 (row / 16) + row / 2 % 4, batch * num_heads + head, offset),
///
/// eight words, of which bit `bit_of(row, col)` is the score's: word d has the first eight digits d of all 32. Digit
/// 8 + d is the exclusive or of digits d of two other scores of the group. Digits of a score are independent, and so
/// are those of any two scores, as no two of their 32 sums have the same terms; and the last eight decide where the
/// first eight are the threshold's, once in 256 scores. By words, a digit of all 32 scores is compared at once.
struct Dropout {
  static constexpr int kBlock = 16, kGroups = 8;  // rows and columns of a block, groups of it
  static constexpr int kDigits = 16, kDrawn = 8;  // of a score; of these drawn for it
  static constexpr int kOther = 11, kApart = 7;   // bits from a score to the two others, and from one to the other
  static constexpr uint32_t kKeepsNone = 1u << 3;

  uint32_t seed_low, seed_high, offset;
  uint32_t digits;  // of the threshold: its hexadecimal digits, as the upper ones of bytes; kKeepsNone
  double scale;

  FLASH_ATTN_HOST_DEVICE static constexpr int bit_of(int64_t row, int64_t col) {
    return int(16 * (col % 2) + 8 * (row % 2) + 4 * (col / 2 % 2) + 2 * (col / 8 % 2) + row / 8 % 2);
  }
  /// Of a group's, those of a row and four columns from `col` on, a multiple of four.
  FLASH_ATTN_HOST_DEVICE static uint32_t four_of(uint32_t kept, int row, int col) {
    const uint32_t x = kept >> bit_of(row, col);
    return (x & 1) | (x >> 15 & 2) | (x >> 2 & 4) | (x >> 17 & 8);
  }
  /// Bit `from_last` of the threshold, as the complement of a word.
  FLASH_ATTN_HOST_DEVICE uint32_t unless_digit(int from_last) const {
    const int bit = from_last / 4 * 8 + 4 + from_last % 4;
#ifdef __CUDA_ARCH__
    uint32_t mask;  // prmt with a selector's upper bits spreads a byte's sign (PTX ISA, "prmt")
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(mask) : "r"(~digits << (7 - bit % 8)), "r"(0x8888 + 0x1111 * (bit / 8)));
    return mask;
#else
    return (digits >> bit & 1) != 0 ? 0u : ~0u;
#endif
  }

  /// Which scores of a group are kept, by the digits drawn for them. Word: a group's, or a vector of several groups'.
  template <typename Word>
  FLASH_ATTN_HOST_DEVICE Word compare(const Word (&words)[kDrawn]) const {
    Word kept = ~Word{};
    for (int i = 0; i < kDigits - kDrawn; ++i) {
      const Word& x = words[kDigits - kDrawn - 1 - i];
      kept = decide(x ^ rotate<kApart>(x), kept, unless_digit(i));
    }
    kept = rotate<kOther>(kept);
    for (int i = 0; i < kDrawn; ++i) kept = decide(words[kDrawn - 1 - i], kept, unless_digit(kDigits - kDrawn + i));
    return kept & ((digits & kKeepsNone) != 0 ? 0u : ~0u);
  }

  /// The same of the group of (row, col).
  template <bool kRolled = false>
  FLASH_ATTN_HOST_DEVICE uint32_t draw(int64_t batch_head, int64_t row, int64_t col) const {
    const uint32_t across = uint32_t(4 * (col / kBlock) + 2 * (col / 4 % 2));
    const uint32_t down = uint32_t(4 * (row / kBlock) + row / 2 % 4);
    Philox4 blocks[2] = {{{across, down, uint32_t(batch_head), offset}},
                         {{across + 1, down, uint32_t(batch_head), offset}}};
    philox4x32<kRolled>(blocks, seed_low, seed_high);
    uint32_t words[kDrawn];
    for (int d = 0; d < kDrawn; ++d) words[d] = blocks[d / 4].word[d % 4];
    return compare(words);
  }

 private:
  /// A one where the threshold has none is kept, a zero where it has a one is not; else later digits have decided.
  template <typename Word>
  FLASH_ATTN_HOST_DEVICE static Word decide(const Word& digit, const Word& kept, uint32_t unless) {
    return (digit & kept) | ((digit | kept) & unless);
  }
  template <int kBits, typename Word>
  FLASH_ATTN_HOST_DEVICE static Word rotate(const Word& x) {
    return (x << kBits) | (x >> (32 - kBits));
  }
};

/// `rng_state` is (seed, offset), read where the kernel runs.
FLASH_ATTN_HOST_DEVICE Dropout make_dropout(const int64_t* rng_state, double dropout_p) {
  const uint64_t seed = uint64_t(rng_state[0]);
  const uint32_t threshold = uint32_t(dropout_p * 65536.0 + 0.5);
  uint32_t digits = threshold < 65536u ? 0 : Dropout::kKeepsNone;
  for (int byte = 0; byte < 4; ++byte) digits |= (threshold >> (4 * byte) & 15u) << (8 * byte + 4);
  const double scale = threshold < 65536u ? 65536.0 / double(65536u - threshold) : 0.0;
  return {uint32_t(seed), uint32_t(seed >> 32), uint32_t(uint64_t(rng_state[1])), digits, scale};
}

}  // namespace flash_attn
