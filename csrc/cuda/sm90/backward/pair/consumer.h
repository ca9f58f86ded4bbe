// A consumer warpgroup of kernel.h, in one of its two roles.
#pragma once

#include "../../../common/scores/mask_fragment.h"
#include "../../hopper/cluster.h"
#include "../../hopper/stmatrix.h"
#include "../../hopper/tma.h"
#include "preparer.h"

namespace flash_attn::cuda::sm90::backward::pair {

enum class Role { kScores, kGradients };

template <typename Config, Role kRole>
struct Consumer {
  using Element = typename Config::Element;
  using Mma = Wgmma<Element>;
  static constexpr bool kScores = kRole == Role::kScores;
  static constexpr int kDepth = kScores ? Config::kHeadDim : Config::kHeadDimV;            // of the product for S or dP
  static constexpr int kColumns = kScores ? Config::kHeadDimV : Config::kHeadDim;          // of dV or dK
  static constexpr int kParts = kColumns > 192 ? 2 : 1, kPartColumns = kColumns / kParts;  // one instruction's
  static constexpr int kWordsP = Config::kBytesP / 128 / 4;                                // of a thread's P

  const KernelParams& params;
  SharedStorage<Config>& shared;
  const int rank, warp, lane;
  int step = 0, steps = 0;
  float acc[kParts][kPartColumns / 2];  // dV or dK, 64 key rows
  float s[32];                          // S^T, P^T; or dP^T, dS^T: 64 key rows by 64 query rows
  float dq[32];                         // 64 query rows by 64 columns
  uint32_t operand[16];                 // s, packed

  FLASH_ATTN_DEVICE void release(uint64_t* barrier) {
    if (threadIdx.x % 128 == 0) mbarrier_arrive(barrier);
  }

  // -- matrix products

  FLASH_ATTN_DEVICE void issue_transposed(const uint8_t* rows, const uint8_t* block, int stage, uint32_t weights) {
    const uint32_t a = cluster_descriptor(rows), b = cluster_descriptor(block);
    wgmma_discard(s);
    wgmma_fence();
    Mma::template ss<false>(s, a, b);
#pragma unroll
    for (int k = 1; k < kDepth / 16; ++k) Mma::template ss<true>(s, a + k_step_along(k, 64), b + k_step_along(k, 64));
    if constexpr (!Config::kExtended) {
      add_statistics(Element{}, s, weights, statistics_descriptor(shared.statistics[stage]));
    }
    wgmma_commit();
  }

  FLASH_ATTN_DEVICE void issue_scores(int stage) {
    issue_transposed(shared.k, shared.q[stage], stage, lse_weights_descriptor(shared.weights));
  }

  FLASH_ATTN_DEVICE void issue_accumulate(const uint8_t* block) {
    const uint32_t b = cluster_descriptor_across(block);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        Mma::template rs<true>(acc[part], operand + 4 * k, b + part * kPartColumns * 8 + k_step_across(k));
      }
    }
    wgmma_commit();
  }

  /// dQ = dS K over this CTA's key rows, then the peer's. The idle consumer of three panels multiplies what lies behind
  /// K, which nobody sees: no branch may part the products.
  FLASH_ATTN_DEVICE void issue_dq(int buffer) {
    constexpr int kColumns64 = kScores ? 0 : 1;  // of this CTA's half
    const uint32_t ds = cluster_descriptor(shared.ds[buffer]), ds_peer = cluster_descriptor(shared.ds_peer[buffer]);
    const uint32_t k = cluster_descriptor_across(shared.k + (2 * rank + kColumns64) * Config::kPanelBytes);
    const uint32_t k_peer = cluster_descriptor_across(shared.k_peer + kColumns64 * Config::kPanelBytes);
    wgmma_discard(dq);
    wgmma_fence();
    Mma::template ss<false, Major::kColumns, Major::kRows>(dq, ds, k);
#pragma unroll
    for (int i = 1; i < 4; ++i)
      Mma::template ss<true, Major::kColumns, Major::kRows>(dq, ds + k_step_along(i, 64), k + k_step_across(i));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Mma::template ss<true, Major::kColumns, Major::kRows>(dq, ds_peer + k_step_along(i, 64),
                                                            k_peer + k_step_across(i));
    }
    wgmma_commit();
  }

  // -- dS of a step goes to the next step's dQ

  FLASH_ATTN_DEVICE void wait_ds(int of_step) {
    mbarrier_wait(&shared.ds_full[of_step % 2], of_step / 2 % 2);
    mbarrier_wait(&shared.ds_peer_full[of_step % 2], of_step / 2 % 2);
  }

  /// dQ has read both copies of dS. The barrier of the next one from the peer is armed before the peer may send.
  FLASH_ATTN_DEVICE void free_ds(int of_step) {
    if (threadIdx.x % 128 != 0) return;
    uint64_t* const free = &shared.ds_free[of_step % 2];
    if (kScores) {
      mbarrier_arrive_expect(&shared.ds_peer_full[of_step % 2], Config::kPanelBytes);
      mbarrier_arrive(free);
    }
    mbarrier_arrive_peer(peer_address(free, rank ^ 1));
  }

  /// `of_step` is the step that dQ belongs to.
  FLASH_ATTN_DEVICE void emit_dq(int64_t block, int of_step) {
    const int panel = 2 * rank + (kScores ? 0 : 1);
    if (panel >= Config::kPanels) return;
    float* const to = params.dq_accum + (block * Config::kDqPanels + panel) * kDqTile + warp * (kDqTile / 4) + lane * 4;
    take_turn(params, shared.dq_turns, of_step, await_turn(params, shared.dq_turns, of_step), to, dq);
  }

  // -- the two parts of a step

  FLASH_ATTN_DEVICE void pack_operand() {
#pragma unroll
    for (int i = 0; i < 16; ++i) operand[i] = pack<Element>(s[2 * i], s[2 * i + 1]);
  }

  /// P in `s` to the gradients warpgroup.
  FLASH_ATTN_DEVICE void send_probabilities(uint32_t to) {
#pragma unroll
    for (int i = 0; i < kWordsP / 4; ++i) {
      if constexpr (Config::kPassesFloats) {
        store_shared(to + i * 2048, s + 4 * i);
      } else {
        uint32_t x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = pack<__half>(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
        store_shared(to + i * 2048, x);
      }
    }
  }

  /// From dP to dS.
  FLASH_ATTN_DEVICE void multiply_probabilities(const uint32_t (&p)[kWordsP]) {
#pragma unroll
    for (int i = 0; i < kWordsP; ++i) {
      if constexpr (Config::kPassesFloats) {
        s[i] *= __uint_as_float(p[i]);
      } else {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(p[i]));
        s[2 * i] *= pair.x;
        s[2 * i + 1] *= pair.y;
      }
    }
  }

  /// From S to P and dV; S of this step is complete.
  FLASH_ATTN_DEVICE void process_scores(int m_block, bool mask) {
    const int stage = step % 2;
    release(&shared.q_empty[stage]);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      // As probability() has it, times a factor.
      s[i] = fast_exp2(fmaf(-fabsf(s[i]), params.scale_log2, Config::kProbabilityExponent));
    }
    if (mask) {
      mask_transposed(s, shared.tile, shared.tile.n_begin + rank * Config::kRowsN + 16 * warp + lane / 4,
                      m_block * Config::kBlockM + 2 * (lane % 4));
    }
    mbarrier_wait(&shared.p_empty[stage], step / 2 % 2 ^ 1);
    send_probabilities(shared_address(shared.p[stage]) + threadIdx.x % 128 * 16);
    mbarrier_arrive(&shared.p_full[stage]);
    pack_operand();
    mbarrier_wait(&shared.dout_full, step % 2);
    issue_accumulate(shared.dout);
  }

  /// dS, packed, to both CTAs' products for dQ.
  FLASH_ATTN_DEVICE void send_ds(int stage, int phase) {
    mbarrier_wait(&shared.ds_free[stage], phase ^ 1);
    const uint32_t row = shared_address(shared.ds[stage]) + ds_store_offset(warp, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) stmatrix_x4_transposed(row + i * 2048, operand + 4 * i);
    async_proxy_fence();  // wgmma and the copy engine read it
    named_barrier_sync(kDsWritten, 128);
    if (threadIdx.x % 128 == 0) {
      mbarrier_arrive(&shared.ds_full[stage]);
      bulk_copy_to_peer(peer_address(shared.ds_peer[stage], rank ^ 1), shared.ds[stage], Config::kPanelBytes,
                        peer_address(&shared.ds_peer_full[stage], rank ^ 1));
    }
  }

  /// dP, dS and dK.
  FLASH_ATTN_DEVICE void process_gradients() {
    const int stage = step % 2, phase = step / 2 % 2;
    mbarrier_wait(&shared.q_full[stage], phase);  // with delta
    mbarrier_wait(&shared.dout_full, step % 2);
    issue_transposed(shared.v, shared.dout, stage, delta_weights_descriptor(shared.weights));
    mbarrier_wait(&shared.p_full[stage], phase);
    uint32_t p[kWordsP];
#pragma unroll
    for (int i = 0; i < kWordsP / 4; ++i) {
      load_shared(shared_address(shared.p[stage]) + threadIdx.x % 128 * 16 + i * 2048, p + 4 * i);
    }
    mbarrier_arrive(&shared.p_empty[stage]);
    wgmma_wait<0>();
    wgmma_results(s);
    release(&shared.dout_empty);
    multiply_probabilities(p);
    pack_operand();
    send_ds(stage, phase);
    issue_accumulate(shared.q[stage]);
  }

  /// dQ of the last step beside dV or dK of this one, then the next S beside the reductions of dQ. The first step's dQ,
  /// and S after the last step, come of whatever the buffers hold and are not used: no branch may part the products.
  FLASH_ATTN_DEVICE void finish_step(int64_t previous_block) {
    const int stage = step % 2;
    if (step > 0) wait_ds(step - 1);
    if constexpr (!kScores) mbarrier_wait(&shared.k_full, 0);  // only here, so that dP need not wait for K
    issue_dq((step + 1) % 2);
    wgmma_wait<1>();
#pragma unroll
    for (int part = 0; part < kParts; ++part) wgmma_results(acc[part]);
    release(kScores ? &shared.dout_empty : &shared.q_empty[stage]);
    if constexpr (kScores) {
      if (step + 1 < steps) mbarrier_wait(&shared.q_full[stage ^ 1], (step + 1) / 2 % 2);
      issue_scores(stage ^ 1);
    }
    wgmma_wait<kScores ? 1 : 0>();
    wgmma_results(dq);
    if (step > 0) {
      free_ds(step - 1);
      emit_dq(previous_block, step - 1);
    }
    if constexpr (kScores) {
      wgmma_wait<0>();
      wgmma_results(s);
    }
  }

  FLASH_ATTN_DEVICE void process_tile() {
    const Tile& tile = shared.tile;
    const IntRange full = tile.band().template full_row_blocks<Config::kBlockM>(tile.n_begin + rank * Config::kRowsN);
    int64_t block = 0;
    if constexpr (kScores) {
      mbarrier_wait(&shared.q_full[0], 0);
      issue_scores(0);
      wgmma_wait<0>();
      wgmma_results(s);
    }
    BlockWalk<Config> walk(tile);
#pragma unroll 1
    for (; step < steps; ++step) {
      if constexpr (kScores) {
        process_scores(walk.m_block, !full.holds(walk.m_block));
      } else {
        process_gradients();
      }
      finish_step(block);
      block = walk.index(params);
      walk.advance();
    }
    wait_ds(steps - 1);
    issue_dq((steps - 1) % 2);
    wgmma_wait<0>();
    wgmma_results(dq);
    emit_dq(block, steps - 1);
  }

  // -- rows of later tiles, see preprocess/prepared_rows.h

  FLASH_ATTN_DEVICE void prepare_block(int i, uint32_t phase) {
    using Rows = PreparedRows<Element, 256, Config::kBlockM, Config::kPanelsV>;
    const QueryShare& share = shared.prepared_share;
    const BlockOfShare at = block_of_share(share, i);
    const int thread = (kScores ? 0 : 128) + 32 * warp + lane_id(), row = thread / Rows::kThreadsOfRow;
    const bool writes = thread % Rows::kThreadsOfRow == 0;
    const bool inside = writes && at.m_block * Config::kBlockM + row < share.seqlen_q;
    const auto load = [&](const RowView& view) { return first_of(view, share, at, Config::kBlockM)[row * view.row]; };
    float lse = -INFINITY, dlse = 0.f;
    if (inside) lse = load(params.problem.lse);
    if (inside && params.preparation.dlse.data != nullptr) dlse = load(params.preparation.dlse);
    mbarrier_wait(&shared.prepared_full, phase);
    const int panel = Rows::panel(thread);
    const float delta = Rows::delta(shared.q[1] + panel * Config::kPanelBytes, prepared_dout(shared, panel), thread,
                                    panel < params.panels_v);
    if (writes) {
      const int64_t block = share.first_block + at.head * params.num_blocks + at.m_block;
      params.statistics[block * Config::kBlockM + row] =
          row_statistics<Element>(lse, delta - dlse, params.softmax_scale, params.inverse_scale);
    }
    mbarrier_arrive(&shared.prepared_empty);
  }

  /// While K is on its way.
  FLASH_ATTN_DEVICE void prepare_rows() {
    if (!params.preparation.enabled()) return;
    mbarrier_wait(&shared.share_chosen, 0);
    for_own_prepared(shared.tile, rank, [&](int i, uint32_t phase) { prepare_block(i, phase); });
    if (rank < shared.tile.prepared_blocks) {
      named_barrier_sync(kBothRead, 256);  // before P and dS come to where dO was
    }
  }

  // -- epilogue: this warp's 16 rows of dV or dK, or of what rounding leaves of them, through V's or K's buffer

  FLASH_ATTN_DEVICE void store_rows(float scale, uint8_t* buffer, const CUtensorMap& map, bool rest) {
    const uint32_t staging = shared_address(buffer) + 16 * warp * 128;
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      const float* const x = &acc[16 * j / kPartColumns][8 * (j % (kPartColumns / 16))];
      const auto pair = [&](int i) {
        const auto packed = rest ? pack_rest<Element> : pack<Element>;
        return packed(x[i] * scale, x[i + 1] * scale);
      };
      const int chunk = swizzled_chunk(j % 4 * 2 + lane / 16, lane);
      stmatrix_x4(staging + j / 4 * Config::kPanelBytes + lane % 16 * 128 + chunk * 16, pair(0), pair(2), pair(4),
                  pair(6));
    }
    async_proxy_fence();
    __syncwarp();
    if (lane != 0) return;
    const Tile& tile = shared.tile;
    for (int panel = 0; panel < (kScores ? params.panels_v : params.panels); ++panel) {
      tma_store(&map, staging + panel * Config::kPanelBytes,
                {64 * panel, tile.dkv_x + rank * Config::kRowsN + 16 * warp, tile.dkv_y, tile.dkv_head + rest,
                 tile.kv_batch});
    }
    tma_store_commit();
    tma_store_wait();  // shared memory must outlive the stores
  }

  FLASH_ATTN_DEVICE void store_gradients(bool rest) {
    if (kScores && params.wants_dv) store_rows(1.f / Config::kProbabilityFactor, shared.v, params.dv, rest);
    if (!kScores && params.wants_dk) {
      store_rows(params.softmax_scale / Config::kProbabilityFactor, shared.k, params.dk, rest);
    }
  }

  FLASH_ATTN_DEVICE void run() {
    prepare_rows();
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) acc[i / (kPartColumns / 2)][i % (kPartColumns / 2)] = 0.f;
    mbarrier_wait(kScores ? &shared.k_full : &shared.v_full, 0);
    steps = (shared.tile.m_end - shared.tile.m_begin) * shared.tile.num_heads;
    if (steps > 0) process_tile();
    named_barrier_sync(kBothRead, 256);
    store_gradients(false);
    if constexpr (Config::kRowParts) {
      __syncwarp();
      store_gradients(true);
    }
  }
};

}  // namespace flash_attn::cuda::sm90::backward::pair
