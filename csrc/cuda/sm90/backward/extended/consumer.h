// A consumer of extended/kernel.h: as single/consumer.h, of the steps that a tile visits, and with every rule for
// scores.
#pragma once

#include "../single/consumer.h"
#include "scores.h"

namespace flash_attn::cuda::sm90::backward::extended {

template <typename Config>
struct Consumer : single::Consumer<Config> {
  using Base = single::Consumer<Config>;
  using Base::dk, Base::dv, Base::s, Base::dp, Base::p, Base::ds, Base::dq;
  using Base::kBlockM, Base::kBlockN, Base::kHeadDim;
  using Base::params, Base::warpgroup, Base::warp, Base::lane, Base::q, Base::tiles, Base::step;
  using typename Base::Element;
  using Scores = StepScores<Config>;
  static constexpr int kPieces = kBlockM / 16;

  SharedStorage<Config>& shared;
  StepReader steps;
  ScoreBits<Config::kWords> kept;  // of the step, by dropout

  // -- what must not reach a product

  /// 0 for what is not finite in this consumer's rows of K and V: a key that attn_mask hides from a query must not
  /// reach its dQ. Rows that do see such a key get NaN by their lse or delta.
  FLASH_ATTN_DEVICE void clear_bad_keys() {
    const int thread = threadIdx.x % 128;
    bool wrote = false;
#pragma unroll 1
    for (int panel = 0; panel < 2 * Config::kPanels; ++panel) {
      uint8_t* const buffer = panel < Config::kPanels ? shared.k[tiles.stage_kv()] : shared.v[tiles.stage_kv()];
      const uint32_t from = shared_address(buffer) + panel % Config::kPanels * Config::kPanelBytesKV +
                            warpgroup * (64 * 128) + thread * 16;
#pragma unroll 1
      for (int i = 0; i < 64 * 128; i += 128 * 16) wrote |= clear_bad_values<Element>(from + i);
    }
    if (wrote) async_proxy_fence();  // wgmma reads them
    named_barrier_sync(kWarpgroup + warpgroup, 128);
  }

  /// 0 for query rows that see no key at all: what they hold, NaN perhaps, must not reach dK and dV. Both consumers
  /// clear all of them.
  FLASH_ATTN_DEVICE void clear_blind_queries() {
    mbarrier_wait(&shared.dout_full[q.stage], q.phase);
    const int thread = threadIdx.x % 128, row = thread % kBlockM;
    float lse;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(lse) : "r"(shared_address(shared.statistics[q.stage]) + 4 * row));
    if (lse == -INFINITY) {
      const uint32_t zeros[4] = {};
#pragma unroll 1
      for (int i = thread / kBlockM; i < 16 * Config::kPanels; i += 128 / kBlockM) {
        uint8_t* const buffer = i % 2 == 0 ? shared.q[q.stage] : shared.dout[q.stage];
        store_shared(shared_address(buffer) + i / 16 * Config::kPanelBytesQ + row * 128 + i / 2 % 8 * 16, zeros);
      }
      async_proxy_fence();  // wgmma reads them
    }
    named_barrier_sync(single::kDsReady, 256);
  }

  // -- the hot loop

  FLASH_ATTN_DEVICE Scores scores_of_step(const Tile& tile, const Step& at, bool partial) {
    const int batch = params.split.heads.divide(tile.batch_head), head = tile.q_head + at.head;
    const uint32_t statistics = shared_address(shared.statistics[q.stage]);
    const int rules = (params.extended.rules & (at.rules & kBiased ? ~0 : ~kLoadsBias)) | at.rules;
    Scores scores{
        params,  tile,       rules, lane, batch, head, tile.n_begin + 64 * warpgroup + 16 * warp, at.m_block * kBlockM,
        partial, statistics, 0.f,   kept};
    if (const ForwardParams& problem = params.problem; problem.alibi_slopes != nullptr) {
      scores.slope = static_cast<const float*>(
          problem.alibi_slopes)[batch * problem.alibi_batch_stride + int64_t{head} * problem.alibi_head_stride];
    }
    return scores;
  }

  /// Where the lane's bits of attn_mask for the step lie, of the first word.
  FLASH_ATTN_DEVICE uint32_t seen_bits() const {
    return shared_address(shared.bits[q.stage]) + (4 * warpgroup + warp) * Config::kWords * 128 + lane_id() * 4;
  }

  FLASH_ATTN_DEVICE void load_seen(Scores& scores) const {
    scores.seen_from = seen_bits();
    if constexpr (Config::kManyRegisters) {
#pragma unroll
      for (int w = 0; w < Config::kWords; ++w) scores.load_word(scores.seen.word[w], scores.seen_from + w * 128);
    }
  }

  FLASH_ATTN_DEVICE void draw(const Tile& tile, const Step& at) {
    const int batch = params.split.heads.divide(tile.batch_head);
    draw_kept(kept, shared.dropout, int64_t{batch} * params.problem.num_heads + tile.q_head + at.head,
              tile.n_begin + 64 * warpgroup + 16 * warp, at.m_block * kBlockM, lane_id());
  }

  FLASH_ATTN_DEVICE void pack_piece(int k) {
#pragma unroll
    for (int i = 4 * k; i < 4 * k + 4; ++i) {
      p[i] = pack<Element>(s[2 * i], s[2 * i + 1]);
      ds[i] = pack<Element>(dp[2 * i], dp[2 * i + 1]);
    }
  }

  /// As Base::store_ds(), whose offset is not worth a register across the step.
  FLASH_ATTN_DEVICE void store_ds() const {
    const uint32_t row =
        shared_address(shared.ds[step % 2]) + warpgroup * Config::kPanelBytesQ + ds_store_offset(warp, lane_id());
#pragma unroll
    for (int k = 0; k < kPieces; ++k) stmatrix_x4_transposed(row + k * 2048, ds + 4 * k);
    async_proxy_fence();  // wgmma reads it, after kDsReady
  }

  /// As Base::emit_dq() and likewise; dq_accum is 0 at first.
  FLASH_ATTN_DEVICE void emit_dq(const Tile& tile, int head, int m_block) {
    if constexpr (Config::kDqPath == DqPath::kWarp) {
      const uint32_t to = shared_address(shared.dq[warpgroup]) + (warp * (kDqTile / 4) + lane_id() * 4) * sizeof(float);
      mbarrier_wait(&shared.dq_empty[warpgroup], (step & 1) ^ 1);  // the last step's has left
#pragma unroll
      for (int i = 0; i < Base::kDqSize; i += 4) store_shared(to + i / 4 * 512, dq + i);
      async_proxy_fence();
      named_barrier_arrive(single::kDqReady + warpgroup, 160);
    } else {
      Base::emit_dq(tile, head, m_block, false);
    }
  }

  FLASH_ATTN_DEVICE uint32_t bias_row() const {
    return shared_address(shared.bias) + warpgroup * Config::kPanelBytesQ + ds_store_offset(warp, lane_id());
  }
  FLASH_ATTN_DEVICE void await_bias() {
    if (Config::kTakesBias && params.extended.bias_by_tma) mbarrier_wait(&shared.bias_full, step % 2);
  }
  FLASH_ATTN_DEVICE void release_bias() {
    if (!Config::kTakesBias || !params.extended.bias_by_tma) return;
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.bias_empty);
  }

  /// From both products to P and dS, packed. Rule by rule: a branch for each piece and rule takes as long as the
  /// products (benchmarks/experiments/076).
  template <int kRules>
  FLASH_ATTN_DEVICE void compute_scores(Scores& scores) {
    await_bias();
    const uint32_t bias = bias_row();
#pragma unroll
    for (int k = 0; k < kPieces; ++k) scores.template to_exponents<kRules>(s + 8 * k, nullptr, k, bias);
    release_bias();
#pragma unroll
    for (int i = 0; i < Base::kFragment; ++i) s[i] = probability(s[i]);
    if (scores.template has<kRules>(kHidden)) {
#pragma unroll
      for (int k = 0; k < kPieces; ++k) scores.hide(s + 8 * k, k);
    }
    if (scores.partial) mask_transposed(s, scores.tile, scores.key(), scores.query());
    wgmma_wait<0>();
    wgmma_results(dp);
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      scores.template to_gradients<kRules>(s + 8 * k, dp + 8 * k, k);
      if (scores.template has<kRules>(kDslopes)) shared.slope_sums[threadIdx.x] += scores.sum_distances(dp + 8 * k, k);
      if constexpr ((kRules & kDmask) == 0) pack_piece(k);
    }
    if constexpr ((kRules & kDmask) != 0) {
      this->pack_fragment(p, s);
      const bool stores = begin_dmask(params, shared.dmask_turns, step);
#pragma unroll
      for (int k = 0; k < kPieces; ++k) scores.store_dmask(dp + 8 * k, k, stores, 1.f);
      end_dmask(params, shared.dmask_turns, step);
      this->pack_fragment(ds, dp);
    }
  }

  /// The same piece by piece, for softcap, whose derivative meets dP at once and takes no registers, and for the rarest
  /// combinations.
  template <int kRules>
  FLASH_ATTN_DEVICE void compute_by_pieces(Scores& scores) {
    await_bias();
    const uint32_t bias = bias_row();
    wgmma_wait<0>();
    wgmma_results(dp);
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      float (&of_piece)[8] = *reinterpret_cast<float (*)[8]>(s + 8 * k);
      scores.template subtract_delta<kRules>(dp + 8 * k, k);
      scores.template to_exponents<kRules>(of_piece, dp + 8 * k, k, bias);
#pragma unroll
      for (int j = 0; j < 8; ++j) of_piece[j] = probability(of_piece[j]);
      if (scores.template has<kRules>(kHidden)) scores.hide(of_piece, k);
      if ((kRules & kAtRunTime) && scores.partial) {
        mask_transposed(of_piece, scores.tile, scores.key(), scores.query() + 16 * k);
      }
      scores.template multiply<kRules>(of_piece, dp + 8 * k, k);
      if (scores.template has<kRules>(kDslopes)) shared.slope_sums[threadIdx.x] += scores.sum_distances(dp + 8 * k, k);
      pack_piece(k);
    }
    release_bias();
  }

  /// What is common has code of its own, in which nothing is looked up.
  FLASH_ATTN_DEVICE void apply_rules(Scores& scores) {
    switch (scores.rules) {
      case kNone: return compute_scores<kNone>(scores);
      case kHidden: return compute_scores<kHidden>(scores);
      case kAlibi: return compute_scores<kAlibi>(scores);
      default: break;
    }
    if constexpr (Config::kTakesBias) {
      if (scores.rules == kBiased) return compute_scores<kBiased>(scores);
    }
    if constexpr (Config::kManyRegisters) {
      switch (scores.rules) {
        case kDropout: return compute_scores<kDropout>(scores);
        case kDropout | kHidden: return compute_scores<kDropout | kHidden>(scores);
        case kBiased | kDmask: return compute_scores<kBiased | kDmask>(scores);
        case kBiased | kLoadsBias: return compute_scores<kBiased | kLoadsBias>(scores);
        default: break;
      }
    } else if (scores.rules == kDropout && !scores.partial) {
      return compute_by_pieces<kDropout>(scores);
    }
    if (scores.rules == kSoftcap && !scores.partial) return compute_by_pieces<kSoftcap>(scores);
    compute_by_pieces<kAtRunTime>(scores);
  }

  FLASH_ATTN_DEVICE void process_step(const Tile& tile, const Step& at, const Step* next, bool partial, bool first) {
    mbarrier_wait(&shared.q_full[q.stage], q.phase);
    if (at.blind) clear_blind_queries();
    this->issue_transposed(s, shared.k[tiles.stage_kv()], shared.q[q.stage], 0);
    mbarrier_wait(&shared.v_full[tiles.stage_kv()], tiles.phase_kv());
    mbarrier_wait(&shared.dout_full[q.stage], q.phase);
    this->issue_transposed(dp, shared.v[tiles.stage_kv()], shared.dout[q.stage], 0);
    Scores scores = scores_of_step(tile, at, partial);
    if ((scores.rules & kHidden) != 0) load_seen(scores);
    wgmma_wait<1>();  // S, and dK of the last step
    wgmma_results(s);
    wgmma_results(dk);
    if (Config::kDkInFlight && !first) this->release(&shared.q_empty[q.stage ^ 1]);
    apply_rules(scores);
    store_ds();
    this->issue_accumulate(dv, p, shared.dout[q.stage]);
    // Both halves of dS are there; also, dQ of the last step has read the other buffer.
    named_barrier_sync(single::kDsReady, 256);
    this->issue_dq();
    // While dV and dQ run; issuing dK, whose operand is in registers, waits for most of both.
    if (next != nullptr && (params.extended.rules & kDropout) != 0) draw(tile, *next);
    this->issue_accumulate(dk, ds, shared.q[q.stage]);
    if constexpr (Config::kDqPath == DqPath::kRegisters) await_turn(params, shared.dq_turns, step);
    wgmma_wait<1>();  // dV and dQ
    wgmma_results(dv);
    wgmma_results(dq);
    this->release(&shared.dout_empty[q.stage]);
    emit_dq(tile, at.head, at.m_block);
    if constexpr (!Config::kDkInFlight) {
      wgmma_wait<0>();
      wgmma_results(dk);
      this->release(&shared.q_empty[q.stage]);
    }
    ++step;
    q.advance();
  }

  /// Of a head's steps, to global memory.
  FLASH_ATTN_DEVICE void store_slope_sum(const Tile& tile, int head) {
    if (params.extended.slope_sums == nullptr) return;
    float sum = shared.slope_sums[threadIdx.x];
    shared.slope_sums[threadIdx.x] = 0.f;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    const int64_t batch_head =
        int64_t{params.split.heads.divide(tile.batch_head)} * params.problem.num_heads + tile.q_head + head;
    const int64_t place = batch_head * params.schedule.num_n_blocks + tile.n_begin / kBlockN;
    if (lane == 0) params.extended.slope_sums[(place * Config::kConsumers + warpgroup) * 4 + warp] = sum;
  }

  FLASH_ATTN_DEVICE void begin_tile() {
    mbarrier_wait(&shared.k_full[tiles.stage_kv()], tiles.phase_kv());
    if (params.problem.mask.data == nullptr) return;
    mbarrier_wait(&shared.v_full[tiles.stage_kv()], tiles.phase_kv());
    clear_bad_keys();
  }

  FLASH_ATTN_DEVICE void process_tile(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;
    static_assert(Config::kStages == 2, "the last step's stage is the other one");
    const IntRange full = tile.band().template full_row_blocks<kBlockM>(tile.n_begin + 64 * warpgroup);
    int head = -1;  // of the last step
    steps.template for_each<false>(shared, [&](const Step& at, bool starts_chunk, bool ends_chunk) {
      const bool first = head < 0;
      if (starts_chunk && (params.extended.rules & kDropout) != 0) draw(tile, at);
      if (at.head != head) {
        first ? begin_tile() : store_slope_sum(tile, head);
        head = at.head;
      }
      process_step(tile, at, ends_chunk ? nullptr : &at + 1, !full.holds(at.m_block), first);
    });
    if (head >= 0) {
      store_slope_sum(tile, head);
    } else {
      mbarrier_wait(&shared.k_full[tiles.stage_kv()], tiles.phase_kv());  // not further ahead of the producer
    }
    forget_derived(tiles.count);
    wgmma_wait<0>();
    wgmma_results(dk);
    if (Config::kDkInFlight && head >= 0) this->release(&shared.q_empty[q.stage ^ 1]);
  }

  FLASH_ATTN_DEVICE void run() {
    shared.slope_sums[threadIdx.x] = 0.f;
    while (true) {
      mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
      const Tile& tile = shared.tiles[tiles.slot()];
      if (tile.num_heads < 0) break;
      process_tile(tile);
      this->store_tile(tile, params.extended.dropout_scale);
      ++tiles.count;
    }
    if (lane == 0) tma_store_wait();  // shared memory must outlive the stores
  }
};

}  // namespace flash_attn::cuda::sm90::backward::extended
