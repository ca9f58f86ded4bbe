// Dropout's random numbers for kLanes rows at once: philox.h, lane by lane the same.
#pragma once

#include "../../philox.h"
#include "scores.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

/// The low and the high half of a * factor in every lane.
FLASH_ATTN_INLINE void multiply_wide(Words a, uint32_t factor, Words& low, Words& high) {
  using Wide = Vec<uint64_t>;
  const Wide pairs = bit_cast<Wide>(a);
#if defined(__AVX512F__)
  const __m512i k = _mm512_set1_epi64(int64_t(factor));
  const Wide even = bit_cast<Wide>(_mm512_maskz_mul_epu32(__mmask8(-1), bit_cast<__m512i>(pairs), k));
  const Wide odd = bit_cast<Wide>(_mm512_maskz_mul_epu32(__mmask8(-1), bit_cast<__m512i>(pairs >> 32), k));
#elif defined(__AVX2__)
  const __m256i k = _mm256_set1_epi64x(int64_t(factor));
  const Wide even = bit_cast<Wide>(_mm256_mul_epu32(bit_cast<__m256i>(pairs), k));
  const Wide odd = bit_cast<Wide>(_mm256_mul_epu32(bit_cast<__m256i>(pairs >> 32), k));
#else
  const Wide even = (pairs & 0xffffffffu) * factor;
  const Wide odd = (pairs >> 32) * factor;
#endif
  constexpr uint64_t kHigh = 0xffffffff00000000u;
  low = bit_cast<Words>((even & ~kHigh) | (odd << 32));
  high = bit_cast<Words>((even >> 32) | (odd & kHigh));
}

FLASH_ATTN_INLINE void philox4x32(Words (&c)[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Words low0, high0, low1, high1;
    multiply_wide(c[0], 0xD2511F53u, low0, high0);
    multiply_wide(c[2], 0xCD9E8D57u, low1, high1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

/// Which scores dropout keeps of the groups of sixteen rows, from row 16 row_block on, and 32 columns, from
/// 16 col_block on: kept (column / 16, row / 2 % 4, column / 4 % 2).
FLASH_ATTN_INLINE void draw_groups(const Dropout& dropout, int64_t batch_head, int64_t row_block, int64_t col_block,
                                   uint32_t (&kept)[2 * Dropout::kGroups]) {
  Words numbers{};
  for (int i = 0; i < kLanes<uint32_t>; ++i) numbers[i] = uint32_t(i);
  for (int n = 0; n < 2 * Dropout::kGroups; n += kLanes<uint32_t>) {
    const Words group = numbers + uint32_t(n);
    Words words[Dropout::kDrawn];
    for (uint32_t half = 0; half < 2; ++half) {
      Words random[4] = {(group / 8u + uint32_t(col_block)) * 4u + group % 2u * 2u + half,
                         group / 2u % 4u + uint32_t(4 * row_block), Words{} + uint32_t(batch_head),
                         Words{} + dropout.offset};
      philox4x32(random, dropout.seed_low, dropout.seed_high);
      for (int i = 0; i < 4; ++i) words[4 * half + i] = random[i];
    }
    const Words found = dropout.compare(words);
    std::memcpy(kept + n, &found, sizeof(Words));
  }
}

/// keep (columns, byte_stride(ld)), rows as lanes: not 0 where dropout keeps a score.
template <typename T>
void draw_dropout(const ScoreRules<T>& rules, const Tile& tile, uint8_t* keep, int64_t ld) {
  constexpr int kSpan = 2 * Dropout::kBlock;
  const Dropout dropout = make_dropout(rules.p.rng_state, rules.p.dropout_p);
  const int64_t stride = byte_stride(ld);
  for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<uint32_t>) {
    const int64_t first_row = tile.m_begin + lane, row_block = first_row / Dropout::kBlock;
    const int row = int(first_row % Dropout::kBlock);
    for (int64_t n = -(tile.n_begin % kSpan); n < tile.columns; n += kSpan) {
      uint32_t kept[2][2 * Dropout::kGroups];  // of the lanes' rows: of one block or two
      for (int i = 0; i * Dropout::kBlock < row + kLanes<uint32_t>; ++i) {
        draw_groups(dropout, rules.batch_head, row_block + i, (tile.n_begin + n) / Dropout::kBlock, kept[i]);
      }
      Words own[4];  // (column / 16, column / 4 % 2): the lanes' groups, from their rows' bits on
      for (int j = 0; j < 4; ++j) {
        for (int i = 0; i < kLanes<uint32_t>; ++i) {
          const int r = row + i;
          own[j][i] = kept[r / 16][j / 2 * 8 + r / 2 % 4 * 2 + j % 2] >> Dropout::bit_of(r, 0);
        }
      }
      for (int c = 0; c < kSpan; ++c) {
        if (n + c < 0 || n + c >= tile.columns) continue;
        const Words bit = own[c / 16 * 2 + c / 4 % 2] >> Dropout::bit_of(0, c) & 1u;
        store_bytes(keep + (n + c) * stride + lane, bit_cast<Words>(bit != 0u));
      }
    }
  }
}

}  // namespace
}  // namespace flash_attn::cpu
