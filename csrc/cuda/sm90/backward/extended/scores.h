// From products to P^T and dS^T where a score is more than scale * q.k: softcap, ALiBi, attn_mask, dropout. A
// consumer's fragments (fragment.h) have keys as rows and queries as columns, and are worked on sixteen queries at a
// time: accumulators 8 k .. 8 k + 7 of a thread, of which number j stands at key 8 (j / 2 % 2), query 8 (j / 4) + j % 2
// from where the thread's first one stands.
#pragma once

#include "../../../common/scores/dropout_bits.h"
#include "../../../common/scores/mask_fragment.h"
#include "../../../common/scores/scores.h"
#include "../../hopper/stmatrix.h"
#include "dmask.h"

namespace flash_attn::cuda::sm90::backward::extended {

constexpr float kLog2E = 1.4426950408889634f;

/// A bit for each of a thread's scores: of query sixteen k in byte k % 4 of word k / 4.
template <int kWords>
struct ScoreBits {
  uint32_t word[kWords];
  FLASH_ATTN_DEVICE void set_all() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) word[w] = ~0u;
  }
  /// Keys eight apart in bit 2, queries eight apart in bit 1, neighbouring queries in bit 0.
  static FLASH_ATTN_DEVICE constexpr int place(int j) { return j % 2 + j / 4 * 2 + j / 2 % 2 * 4; }
  FLASH_ATTN_DEVICE bool hold(int k, int j) const { return (word[k / 4] & 1u << (8 * (k % 4) + place(j))) != 0; }
};

/// Numbers whose bits 2^kBit and 2^(kBit + 1) differ change places.
template <int kBit>
FLASH_ATTN_DEVICE uint32_t swap_places(uint32_t x) {
  constexpr int kShift = 1 << kBit;
  constexpr uint32_t kMoved = ~0u / ((1u << 4 * kShift) - 1) * ((1u << kShift) - 1) << kShift;
  const uint32_t differing = (x ^ x >> kShift) & kMoved;
  return x ^ differing ^ differing << kShift;
}

/// Which scores of a warp, sixteen keys by 64 kWords queries from these first ones on, dropout keeps.
template <int kWords>
FLASH_ATTN_DEVICE void draw_kept(ScoreBits<kWords>& kept, const Dropout& dropout, int64_t batch_head, int first_key,
                                 int first_query, int lane) {
  KeptScores<true, 1, 4 * kWords> drawn;
  drawn.draw(dropout, batch_head, first_query, first_key, lane);
  // From (neighbouring queries, sixteen queries, keys eight apart, queries eight apart) to the order of ScoreBits.
#pragma unroll
  for (int w = 0; w < kWords; ++w) kept.word[w] = swap_places<0>(swap_places<1>(swap_places<2>(drawn.bits[w])));
}

/// One step's, of a thread. What is the same for the whole launch is read from `params` where it is used.
template <typename Config>
struct StepScores {
  using Element = typename Config::Element;
  static constexpr int kBlockM = Config::kBlockM, kWords = Config::kWords, kPieces = kBlockM / 16;
  static constexpr int kFragment = kBlockM / 2;  // scores of a thread

  const KernelParams& params;
  const Tile& tile;
  const int rules;
  const int lane;
  const int batch, head;             // head: query head
  const int first_key, first_query;  // of the warp's scores, in their sequences
  const bool partial;                // some scores do not exist by causal, window or lengths
  const uint32_t statistics;         // of accumulator 0's query, in shared memory
  float slope;                       // ALiBi's
  const ScoreBits<kWords>& kept;     // by dropout
  ScoreBits<kWords> seen;            // by attn_mask's bits
  uint32_t seen_from;                // without kManyRegisters in their place: where the lane's lie in shared memory

  /// Whether a rule applies, where some are compiled in.
  template <int kRules>
  FLASH_ATTN_DEVICE bool has(int rule) const {
    constexpr int kPossible = Config::kTakesBias ? ~0 : ~(kBiased | kLoadsBias | kDmask);
    return ((kRules & kAtRunTime ? rules : kRules) & kPossible & rule) != 0;
  }

  // Of accumulator 0. Worked out where they are used: not worth registers.
  FLASH_ATTN_DEVICE int key() const { return first_key + fresh_lane() / 4; }
  FLASH_ATTN_DEVICE int query() const { return first_query + fresh_lane() % 4 * 2; }
  FLASH_ATTN_DEVICE uint32_t fresh_lane() const {
    uint32_t x = lane;
    forget_derived(x);
    return x;
  }

  // -- pieces of sixteen queries

  enum Statistic : int { kLseLog2 = 0, kDelta = 1, kLse = 2, kLost = 3 };

  FLASH_ATTN_DEVICE void load_pair(float (&x)[2], int k, int n, Statistic plane) const {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x[0]), "=f"(x[1])
                 : "r"(statistics + fresh_lane() % 4 * 8 + (16 * k + 8 * n + plane * kBlockM) * 4));
  }

  /// Query's place less key's, of accumulator 0: ALiBi's distance but for its sign.
  FLASH_ATTN_DEVICE float first_distance() const {
    const int diagonal = params.problem.causal == Causal::kTopLeft ? 0 : tile.seqlen_k - tile.seqlen_q;
    return float(query() + diagonal - key());
  }
  /// The same of number j of piece k.
  static FLASH_ATTN_DEVICE float distance(float first, int k, int j) {
    return fabsf(first + float(16 * k + 8 * (j / 4) + j % 2 - 8 * (j / 2 % 2)));
  }

  /// Of scores, from where they lie in memory: what is not part of the problem is not read. Four at a time, and what
  /// leads to their addresses is worked out each time, or it takes too many registers.
  template <typename Storage, typename Convert>
  FLASH_ATTN_DEVICE void load_bias(float (&bias)[8], int k, Convert convert) const {
    const MaskView& mask = params.problem.mask;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int first = query() + 16 * k + 8 * n, column = key();
      const Storage* const from = static_cast<const Storage*>(mask.data) + batch * mask.batch + head * mask.head +
                                  first * mask.row + column * mask.col;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool exists = first + j % 2 < tile.seqlen_q && column + j / 2 * 8 < tile.seqlen_k;
        bias[4 * n + j] = exists ? convert(from[j % 2 * mask.row + j / 2 * 8 * mask.col]) : 0.f;
      }
      asm volatile("" ::: "memory");  // the next four later
    }
  }

  template <int kRules>
  FLASH_ATTN_DEVICE void bias_of(float (&bias)[8], int k, uint32_t bias_row) const {
    if constexpr ((kRules & kLoadsBias) == 0) {
      uint32_t raw[4];
      ldmatrix_x4_transposed(raw, bias_row + k * 2048);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        bias[j] = j % 2 == 0 ? low_half(raw[j / 2], Element()) : high_half(raw[j / 2], Element());
      }
    } else if (params.problem.mask.dtype == DType::kFloat32) {
      load_bias<float>(bias, k, [](float x) { return x; });
    } else {
      load_bias<uint16_t>(bias, k, [](uint16_t x) { return low_half(uint32_t{x}, Element()); });
    }
  }

  /// What is exponentiated, to the base 2, in place of the product; with softcap dP less delta is multiplied by the
  /// derivative of each score by the product. Natural scores, for softcap or because a bias of the smallest number
  /// times log2(e) would be -inf, meet the natural lse.
  template <int kRules>
  FLASH_ATTN_DEVICE void to_exponents(float* s, float* dp, int k, uint32_t bias_row) const {
    const bool natural = has<kRules>(kSoftcap | kBiased);
    float lse[2][2];
    load_pair(lse[0], k, 0, natural ? kLse : kLseLog2);
    load_pair(lse[1], k, 1, natural ? kLse : kLseLog2);
    if (!natural) {
#pragma unroll
      for (int j = 0; j < 8; ++j) s[j] = fmaf(s[j], params.scale_log2, lse[j / 4][j % 2]);
      if (has<kRules>(kAlibi)) subtract_distances(s, k, slope * kLog2E);
      return;
    }
    if (has<kRules>(kSoftcap)) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float tanh = tanh_by_exp2(s[j] * params.extended.scale_over_softcap);
        dp[j] *= fmaf(-tanh, tanh, 1.f);
        s[j] = params.extended.softcap * tanh;
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) s[j] *= params.softmax_scale;
    }
    float lost[2][2] = {};
    if (has<kRules>(kBiased)) {
      float bias[8];
      bias_of<kRules>(bias, k, bias_row);
#pragma unroll
      for (int j = 0; j < 8; ++j) s[j] += bias[j];
      load_pair(lost[0], k, 0, kLost);
      load_pair(lost[1], k, 1, kLost);
    }
    if (has<kRules>(kAlibi)) subtract_distances(s, k, slope);
#pragma unroll
    for (int j = 0; j < 8; ++j) s[j] = fmaf(s[j] + lse[j / 4][j % 2], kLog2E, lost[j / 4][j % 2]);
  }

  FLASH_ATTN_DEVICE void subtract_distances(float* s, int k, float factor) const {
    const float first = first_distance();
#pragma unroll
    for (int j = 0; j < 8; ++j) s[j] = fmaf(-factor, distance(first, k, j), s[j]);
  }

  /// What is hidden has no probability, whatever its score was.
  FLASH_ATTN_DEVICE void hide(float* p, int k) {
    if (!Config::kManyRegisters) load_word(seen.word[k / 4], seen_from + k / 4 * 128);
#pragma unroll
    for (int j = 0; j < 8; ++j) p[j] = seen.hold(k, j) ? p[j] : 0.f;
  }

  FLASH_ATTN_DEVICE void load_word(uint32_t& x, uint32_t from) const {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from));
  }

  /// dS in place of dP, and what of P dropout keeps.
  template <int kRules>
  FLASH_ATTN_DEVICE void to_gradients(float* p, float* dp, int k) const {
    float delta[2][2];
    load_pair(delta[0], k, 0, kDelta);
    load_pair(delta[1], k, 1, kDelta);
    if (has<kRules>(kDropout)) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float of_delta = p[j] * delta[j / 4][j % 2];
        p[j] = kept.hold(k, j) ? p[j] : 0.f;
        dp[j] = fmaf(p[j], dp[j] * params.extended.dropout_scale, of_delta);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) dp[j] = p[j] * (dp[j] + delta[j / 4][j % 2]);
    }
  }

  /// The same in two steps, between which P comes about: dP less delta, and dS.
  template <int kRules>
  FLASH_ATTN_DEVICE void subtract_delta(float* dp, int k) const {
    float delta[2][2];
    load_pair(delta[0], k, 0, kDelta);
    load_pair(delta[1], k, 1, kDelta);
    if (has<kRules>(kDropout)) {
#pragma unroll
      for (int j = 0; j < 8; ++j) dp[j] = kept.hold(k, j) ? dp[j] * params.extended.dropout_scale : 0.f;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) dp[j] += delta[j / 4][j % 2];
  }
  template <int kRules>
  FLASH_ATTN_DEVICE void multiply(float* p, float* dp, int k) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) dp[j] *= p[j];
    if (has<kRules>(kDropout)) {
#pragma unroll
      for (int j = 0; j < 8; ++j) p[j] = kept.hold(k, j) ? p[j] : 0.f;
    }
  }

  FLASH_ATTN_DEVICE float sum_distances(const float* ds, int k) const {
    const float first = first_distance();
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(ds[j], distance(first, k, j), sum);
    return sum;
  }

  /// dS times a factor, stored or added. Numbers within a slice of the mask have 32 bits (plan.cpp).
  FLASH_ATTN_DEVICE void store_dmask(const float* ds, int k, bool stores, float factor) const {
    const MaskView& mask = params.problem.mask;
    const int rows = static_cast<int>(mask.row_size), columns = static_cast<int>(mask.col_size);
    float* const slice = params.extended.dmask + mask_slice(mask, batch, head) * mask.row_size * mask.col_size;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int row = query() + 16 * k + 8 * n, column = key();
      float* const to = slice + (row * columns + column);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (row + j % 2 < rows && column + j / 2 * 8 < columns) {
          store_or_add(stores, to + j % 2 * columns + j / 2 * 8, ds[4 * n + j] * factor);
        }
      }
    }
  }
};

}  // namespace flash_attn::cuda::sm90::backward::extended
