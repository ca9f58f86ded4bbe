// A consumer of extended_pair/kernel.h: as pair/consumer.h, of the steps that a tile visits, and with every rule for
// scores.
//
// All rules but dropout's sign and attn_mask's gradient are the scores warpgroup's. What it passes on is by what dP
// less delta is to be multiplied: P, times softcap's derivative; with the sign set where dropout drops the score, whose
// dP is 0 then.
#pragma once

#include "../extended/classes.h"
#include "../extended/dmask.h"
#include "../extended/scores.h"
#include "../pair/consumer.h"
#include "config.h"

namespace flash_attn::cuda::sm90::backward::extended_pair {

using extended::Step;
using pair::Role;

template <typename Config, Role kRole>
struct Consumer : pair::Consumer<Config, kRole> {
  using Base = pair::Consumer<Config, kRole>;
  using Base::operand, Base::kScores, Base::kWordsP, Base::kParts;
  using Base::params, Base::shared, Base::rank, Base::warp, Base::lane, Base::step, Base::acc, Base::s, Base::dq;
  using typename Base::Element;
  using Scores = extended::StepScores<Config>;
  static constexpr int kPieces = Config::kBlockM / 16;

  extended::StepCursor<pair::SharedStorage<Config>> steps;
  extended::ScoreBits<1> kept, seen;  // of the step, by dropout and by attn_mask
  float slope_sum = 0.f;              // of the head so far

  // -- what must not reach a product

  FLASH_ATTN_DEVICE void sync_warpgroup() const { named_barrier_sync(kWarpgroup + !kScores, 128); }

  FLASH_ATTN_DEVICE bool clear_bad_values_of(uint8_t* buffer, int bytes) const {
    bool wrote = false;
#pragma unroll 1
    for (int i = threadIdx.x % 128 * 16; i < bytes; i += 128 * 16) {
      wrote |= backward::clear_bad_values<Element>(shared_address(buffer) + i);
    }
    return wrote;
  }

  /// See extended/consumer.h.
  FLASH_ATTN_DEVICE void clear_bad_keys() const {
    mbarrier_wait(&shared.k_full, 0);
    bool wrote;
    if constexpr (kScores) {
      wrote = clear_bad_values_of(shared.k, Config::kBytes);
    } else {
      wrote = clear_bad_values_of(shared.k_peer, Config::kBytesPeer);
      mbarrier_wait(&shared.v_full, 0);
      wrote |= clear_bad_values_of(shared.v, Config::kBytesV);
    }
    if (wrote) async_proxy_fence();  // wgmma reads them
    named_barrier_sync(pair::kBothRead, 256);
  }

  /// 0 for query rows that see no key at all: what they hold, NaN perhaps, must not reach dK and dV. `rows`: Q or dO of
  /// a step, all of which this warpgroup clears itself, unless it comes after the other.
  FLASH_ATTN_DEVICE void clear_blind_queries(uint8_t* rows, int bytes, int stage) const {
    const int thread = threadIdx.x % 128, row = thread % 64;
    float lse;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(lse) : "r"(shared_address(shared.statistics[stage]) + 4 * row));
    if (lse == -INFINITY) {
      const uint32_t zeros[4] = {};
#pragma unroll 1
      for (int i = thread / 64 * 16; i < bytes / 64; i += 32) {
        store_shared(shared_address(rows) + i / 128 * Config::kPanelBytes + row * 128 + i % 128, zeros);
      }
      async_proxy_fence();  // wgmma reads them
    }
    sync_warpgroup();
  }

  // -- rules

  FLASH_ATTN_DEVICE Scores scores_of_step(const Step& at, bool partial) {
    const Tile& tile = shared.tile;
    const int batch = params.split.heads.divide(tile.batch_head), head = tile.q_head + at.head;
    const int rules = (params.extended.rules & (at.rules & extended::kBiased ? ~0 : ~extended::kLoadsBias)) | at.rules;
    Scores scores{params,
                  tile,
                  rules,
                  lane,
                  batch,
                  head,
                  tile.n_begin + rank * Config::kRowsN + 16 * warp,
                  at.m_block * Config::kBlockM,
                  partial,
                  shared_address(shared.statistics[step % 2]),
                  0.f,
                  kept,
                  seen};
    if (const ForwardParams& problem = params.problem; kScores && problem.alibi_slopes != nullptr) {
      scores.slope = static_cast<const float*>(
          problem.alibi_slopes)[batch * problem.alibi_batch_stride + int64_t{head} * problem.alibi_head_stride];
    }
    return scores;
  }

  /// Bits of attn_mask and dropout's, for the next step, while products run.
  FLASH_ATTN_DEVICE void look_ahead(const Step& at) {
    if ((at.rules & extended::kHidden) != 0) {
      const uint32_t* const bits = params.extended.classes.bits + int64_t{at.block} * bits_of_block(Config::kBlockM);
      seen.word[0] = bits[(4 * rank + warp) * 32 + lane_id()];
    }
    if ((params.extended.rules & extended::kDropout) != 0) {
      const Tile& tile = shared.tile;
      const int batch = params.split.heads.divide(tile.batch_head);
      extended::draw_kept(kept, shared.dropout, int64_t{batch} * params.problem.num_heads + tile.q_head + at.head,
                          tile.n_begin + rank * Config::kRowsN + 16 * warp, at.m_block * Config::kBlockM, lane_id());
    }
  }

  /// What goes to the gradients warpgroup of sixteen queries.
  FLASH_ATTN_DEVICE void send_piece(const float (&x)[8], int k) const {
    const uint32_t to = shared_address(shared.p) + threadIdx.x % 128 * 16;
    if constexpr (Config::kPassesFloats) {
      store_shared(to + 2 * k * 2048, x);
      store_shared(to + (2 * k + 1) * 2048, x + 4);
    } else {
      uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) packed[j] = pack<__half>(x[2 * j], x[2 * j + 1]);
      store_shared(to + k * 2048, packed);
    }
  }

  /// From S to P, packed, and what is passed on.
  template <int kRules>
  FLASH_ATTN_DEVICE void compute_scores(Scores& scores) {
    if (params.extended.bias_by_tma) mbarrier_wait(&shared.bias_full, step % 2);
    mbarrier_wait(&shared.p_empty, step % 2 ^ 1);
    const uint32_t bias = shared_address(shared.bias) + ds_store_offset(warp, lane);
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      float (&x)[8] = *reinterpret_cast<float (*)[8]>(s + 8 * k);
      float derivative[8] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f}, passed[8];
      scores.template to_exponents<kRules>(x, derivative, k, bias);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = fast_exp2(float(Config::kProbabilityExponent) - fabsf(x[j]));
      if (scores.template has<kRules>(extended::kHidden)) scores.hide(x, k);
      if (scores.partial) mask_transposed(x, scores.tile, scores.key(), scores.query() + 16 * k);
#pragma unroll
      for (int j = 0; j < 8; ++j) passed[j] = x[j];
      if (scores.template has<kRules>(extended::kSoftcap)) {
#pragma unroll
        for (int j = 0; j < 8; ++j) passed[j] *= derivative[j];
      }
      if (scores.template has<kRules>(extended::kDropout)) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const bool keeps = kept.hold(k, j);
          passed[j] = keeps ? passed[j] : -passed[j];
          x[j] = keeps ? x[j] : 0.f;
        }
      }
      send_piece(passed, k);
#pragma unroll
      for (int j = 0; j < 4; ++j) operand[4 * k + j] = pack<Element>(x[2 * j], x[2 * j + 1]);
    }
    mbarrier_arrive(&shared.p_full);
    if (params.extended.bias_by_tma) {
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&shared.bias_empty);
    }
  }

  /// What is common has code of its own, in which nothing is looked up.
  FLASH_ATTN_DEVICE void apply_rules(Scores& scores) {
    using namespace extended;
    switch (Config::kStoresDmask ? scores.rules & ~kDmask : scores.rules) {  // that is the other's
      case kNone: return compute_scores<kNone>(scores);
      case kHidden: return compute_scores<kHidden>(scores);
      case kBiased: return compute_scores<kBiased>(scores);
      case kBiased | kLoadsBias: return compute_scores<kBiased | kLoadsBias>(scores);
      case kDropout: return compute_scores<kDropout>(scores);
      default: return compute_scores<kAtRunTime>(scores);
    }
  }

  FLASH_ATTN_DEVICE float passed_value(const uint32_t (&p)[kWordsP], int i) const {
    if constexpr (Config::kPassesFloats) {
      return __uint_as_float(p[i]);
    } else {
      const __half2& pair = reinterpret_cast<const __half2&>(p[i / 2]);
      return i % 2 == 0 ? __low2float(pair) : __high2float(pair);
    }
  }

  /// From dP to dS.
  template <bool kDropout>
  FLASH_ATTN_DEVICE void to_gradients(const Scores& scores, const uint32_t (&p)[kWordsP]) {
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      float delta[2][2];
      scores.load_pair(delta[0], k, 0, Scores::kDelta);
      scores.load_pair(delta[1], k, 1, Scores::kDelta);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float& x = s[8 * k + j];
        const float passed = passed_value(p, 8 * k + j), of_delta = delta[j / 4][j % 2];
        if constexpr (kDropout) {
          const float dp = __float_as_int(passed) < 0 ? 0.f : x;
          x = fabsf(passed) * fmaf(dp, params.extended.dropout_scale, of_delta);
        } else {
          x = passed * (x + of_delta);
        }
      }
    }
  }

  // -- the two parts of a step

  FLASH_ATTN_DEVICE void issue_scores(int stage) { Base::issue_transposed(shared.k, shared.q[stage], stage, 0); }

  /// From S to P and dV; S of this step is complete.
  FLASH_ATTN_DEVICE void process_scores(const Step& at, bool partial) {
    Scores scores = scores_of_step(at, partial);
    apply_rules(scores);
    mbarrier_wait(&shared.dout_full, step % 2);
    if (at.blind) clear_blind_queries(shared.dout, Config::kBytesV, step % 2);
    Base::issue_accumulate(shared.dout);
  }

  /// dP, dS and dK. Q of rows that see nothing is 0 since the scores warpgroup has passed P on.
  FLASH_ATTN_DEVICE void process_gradients(const Step& at) {
    const int stage = step % 2, phase = step / 2 % 2;
    mbarrier_wait(&shared.q_full[stage], phase);  // with delta
    mbarrier_wait(&shared.dout_full, step % 2);
    if (at.blind) clear_blind_queries(shared.dout, Config::kBytesV, stage);
    Base::issue_transposed(shared.v, shared.dout, stage, 0);
    Scores scores = scores_of_step(at, false);
    mbarrier_wait(&shared.p_full, step % 2);
    uint32_t p[kWordsP];
#pragma unroll
    for (int i = 0; i < kWordsP / 4; ++i) {
      load_shared(shared_address(shared.p) + threadIdx.x % 128 * 16 + i * 2048, p + 4 * i);
    }
    mbarrier_arrive(&shared.p_empty);
    wgmma_wait<0>();
    wgmma_results(s);
    Base::release(&shared.dout_empty);
    if ((scores.rules & extended::kDropout) != 0) {
      to_gradients<true>(scores, p);
    } else {
      to_gradients<false>(scores, p);
    }
    if ((scores.rules & extended::kDslopes) != 0) {
#pragma unroll
      for (int k = 0; k < kPieces; ++k) slope_sum += scores.sum_distances(s + 8 * k, k);
    }
    if constexpr (Config::kStoresDmask) {
      DqTurns& turns = shared.dmask_turns[0];
      const bool stores = extended::begin_dmask(params, turns, step);
#pragma unroll
      for (int k = 0; k < kPieces; ++k) scores.store_dmask(s + 8 * k, k, stores, 1.f / Config::kProbabilityFactor);
      extended::end_dmask(params, turns, step);
    }
    Base::pack_operand();
    Base::send_ds(stage, phase);
    Base::issue_accumulate(shared.q[stage]);
  }

  /// As Base::finish_step(); whether there are `more` steps is known by the list, which stands at the next one. Q's
  /// stage holds the statistics too: it is free when both warpgroups have used them.
  FLASH_ATTN_DEVICE void finish_step(int64_t previous_block, bool more) {
    const int stage = step % 2;
    if (step > 0) Base::wait_ds(step - 1);
    if constexpr (!kScores) mbarrier_wait(&shared.k_full, 0);
    Base::issue_dq((step + 1) % 2);
    if (kScores && more) look_ahead(steps.at());
    wgmma_wait<1>();
#pragma unroll
    for (int part = 0; part < kParts; ++part) wgmma_results(acc[part]);
    if constexpr (kScores) Base::release(&shared.dout_empty);
    Base::release(&shared.q_empty[stage]);
    if constexpr (kScores) {
      if (more) {
        mbarrier_wait(&shared.q_full[stage ^ 1], (step + 1) / 2 % 2);
        if (steps.at().blind) clear_blind_queries(shared.q[stage ^ 1], Config::kBytes, stage ^ 1);
      }
      issue_scores(stage ^ 1);
    }
    wgmma_wait<kScores ? 1 : 0>();
    wgmma_results(dq);
    if (step > 0) {
      Base::free_ds(step - 1);
      Base::emit_dq(previous_block, step - 1);
    }
    if constexpr (kScores) {
      wgmma_wait<0>();
      wgmma_results(s);
    }
  }

  /// Of a head's steps, to global memory.
  FLASH_ATTN_DEVICE void store_slope_sum(int head) {
    if (kScores || params.extended.slope_sums == nullptr) return;
    float sum = slope_sum * (1.f / Config::kProbabilityFactor);
    slope_sum = 0.f;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    const Tile& tile = shared.tile;
    const int64_t batch_head =
        int64_t{params.split.heads.divide(tile.batch_head)} * params.problem.num_heads + tile.q_head + head;
    const int64_t place = batch_head * params.schedule.num_n_blocks + tile.n_begin / Config::kBlockN;
    if (lane == 0) params.extended.slope_sums[(place * Config::kCtas + rank) * 4 + warp] = sum;
  }

  FLASH_ATTN_DEVICE void begin_tile() {
    if (params.problem.mask.data != nullptr) clear_bad_keys();
    if constexpr (!kScores) return;
    const Step& at = steps.at();
    look_ahead(at);
    mbarrier_wait(&shared.q_full[0], 0);
    if (at.blind) clear_blind_queries(shared.q[0], Config::kBytes, 0);
    issue_scores(0);
    wgmma_wait<0>();
    wgmma_results(s);
  }

  /// Of a tile that has steps.
  FLASH_ATTN_DEVICE void process_tile() {
    const Tile& tile = shared.tile;
    const IntRange full = tile.band().template full_row_blocks<Config::kBlockM>(tile.n_begin + rank * Config::kRowsN);
    begin_tile();
    int64_t block = 0;
    bool more;
#pragma unroll 1
    do {
      const Step& at = steps.at();
      const int64_t of_step = extended::block_of_step(params, tile, at);
      const int head = at.head;
      if constexpr (kScores) {
        process_scores(at, !full.holds(at.m_block));
      } else {
        process_gradients(at);
      }
      more = steps.advance();
      if (!more || steps.at().head != head) store_slope_sum(head);
      finish_step(block, more);
      block = of_step;
      ++step;
    } while (more);
    Base::wait_ds(step - 1);
    Base::issue_dq((step - 1) % 2);
    wgmma_wait<0>();
    wgmma_results(dq);
    Base::emit_dq(block, step - 1);
  }

  FLASH_ATTN_DEVICE void store_gradients() {
    constexpr float kScale = 1.f / Config::kProbabilityFactor;
    if (kScores && params.wants_dv) {
      Base::store_rows(params.extended.dropout_scale * kScale, shared.v, params.dv, false);
    }
    if (!kScores && params.wants_dk) Base::store_rows(params.softmax_scale * kScale, shared.k, params.dk, false);
  }

  FLASH_ATTN_DEVICE void run() {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < Base::kPartColumns / 2; ++i) acc[part][i] = 0.f;
    }
    mbarrier_wait(kScores ? &shared.k_full : &shared.v_full, 0);  // also before gradients leave through their buffers
    if (steps.begin()) process_tile();
    named_barrier_sync(pair::kBothRead, 256);
    store_gradients();
  }
};

}  // namespace flash_attn::cuda::sm90::backward::extended_pair
