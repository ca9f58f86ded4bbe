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

/// keep (columns, byte_stride(ld)), rows as lanes: not 0 where dropout keeps a score.
template <typename T>
void draw_dropout(const ScoreRules<T>& rules, const Tile& tile, uint8_t* keep, int64_t ld) {
  const Dropout dropout = make_dropout(rules.p.rng_state, rules.p.dropout_p);
  const int64_t stride = byte_stride(ld);
  Words numbers{};
  for (int i = 0; i < kLanes<uint32_t>; ++i) numbers[i] = uint32_t(i);
  for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<uint32_t>) {
    const Words rows = numbers + uint32_t(tile.m_begin + lane);
    for (int64_t n = -(tile.n_begin % Dropout::kColumns); n < tile.columns; n += Dropout::kColumns) {
      Words random[4] = {Words{} + uint32_t((tile.n_begin + n) / Dropout::kColumns), rows,
                         Words{} + uint32_t(rules.batch_head), Words{} + dropout.offset};
      philox4x32(random, dropout.seed_low, dropout.seed_high);
      for (int i = 0; i < Dropout::kColumns; ++i) {
        if (n + i < 0 || n + i >= tile.columns) continue;
        const Words bits = (random[i / 2] >> (16 * (i % 2))) & 0xffffu;
        store_bytes(keep + (n + i) * stride + lane, bit_cast<Words>(bits >= dropout.threshold));
      }
    }
  }
}

}  // namespace
}  // namespace flash_attn::cpu
