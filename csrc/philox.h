// Dropout's random numbers: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, section
// 3.3): seven rounds are the fewest that pass BigCrush (table 2 there). The key is the seed; the counter is the place
// of eight neighbouring scores. So every kernel draws the same mask, whatever its tiles and its order.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace flash_attn {

struct Philox4 {
  uint32_t word[4];
};

constexpr int kPhiloxRounds = 7;

/// kRolled: on a GPU the rounds stay a loop, for kernels that have no registers left.
template <bool kRolled = false>
FLASH_ATTN_HOST_DEVICE Philox4 philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                          uint32_t k1) {
  int rounds = kPhiloxRounds;
#ifdef __CUDA_ARCH__
  if constexpr (kRolled) asm volatile("" : "+r"(rounds));
#endif
  for (int round = 0; round < rounds; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// One call's dropout. Score (batch, head, row, col), row and col counted from the start of their sequence, owns
/// sixteen bits: half (col % 2) of word (col % 8) / 2 of the block with counter (col / 8, row, batch * num_heads +
/// head, offset). It is kept when they are at least `threshold`; what is kept is multiplied by `scale`, one over the
/// share kept.
struct Dropout {
  static constexpr int kColumns = 8;  // scores a Philox block serves
  uint32_t seed_low, seed_high, offset, threshold;
  double scale;

  template <bool kRolled = false>
  FLASH_ATTN_HOST_DEVICE Philox4 block(int64_t batch_head, int64_t row, int64_t col) const {
    return philox4x32<kRolled>(uint32_t(col / kColumns), uint32_t(row), uint32_t(batch_head), offset, seed_low,
                               seed_high);
  }
  FLASH_ATTN_HOST_DEVICE bool keep(const Philox4& random, int col) const {
    const int i = col % kColumns;
    return ((random.word[i / 2] >> (16 * (i % 2))) & 0xffffu) >= threshold;
  }
};

/// `rng_state` is (seed, offset), read where the kernel runs.
FLASH_ATTN_HOST_DEVICE Dropout make_dropout(const int64_t* rng_state, double dropout_p) {
  const uint64_t seed = uint64_t(rng_state[0]);
  const uint32_t threshold = uint32_t(dropout_p * 65536.0 + 0.5);
  const double scale = threshold < 65536u ? 65536.0 / double(65536u - threshold) : 0.0;
  return {uint32_t(seed), uint32_t(seed >> 32), uint32_t(uint64_t(rng_state[1])), threshold, scale};
}

}  // namespace flash_attn
