// A consumer of single/kernel.h: S, dP, P, dS, and the sums dK and dV in its registers; its part of dQ leaves.
#pragma once

#include "../../../common/scores/mask_fragment.h"
#include "../../../common/scores/probability.h"
#include "../../hopper/stmatrix.h"
#include "../../hopper/tma.h"
#include "../dq/rows.h"
#include "../schedule/walk.h"

namespace flash_attn::cuda::sm90::backward::single {

template <typename Config>
struct Consumer {
  using Element = typename Config::Element;
  using Mma = Wgmma<Element>;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kHeadDim = Config::kHeadDim;
  static constexpr int kFragment = kBlockM / 2;  // floats a thread of 64 x kBlockM
  static constexpr int kDqSize = kDqTile / 128;  // the same of 64 x 64

  const KernelParams& params;
  SharedStorage<Config>& shared;
  const int warpgroup, warp, lane;
  Ring<Config::kStages> q;
  TileRing<Config> tiles;
  uint32_t step = 0;                         // over all tiles
  float dk[kHeadDim / 2], dv[kHeadDim / 2];  // without softmax_scale
  float s[kFragment], dp[kFragment];         // S^T, then P^T; dP^T, then dS^T
  uint32_t p[kFragment / 2], ds[kFragment / 2];
  float dq[kDqSize];

  // -- matrix products

  /// acc = rows (64 of K or V) block^T (kBlockM rows of Q or dO), plus the statistics of the block's rows (in
  /// extended/scores.h the scores take these themselves).
  FLASH_ATTN_DEVICE void issue_transposed(float (&acc)[kFragment], const uint8_t* rows, const uint8_t* block,
                                          uint32_t weights) {
    const uint32_t a = descriptor(rows) + warpgroup * (64 * 128 / 16), b = descriptor(block);
    wgmma_discard(acc);
    wgmma_fence();
    Mma::template ss<false>(acc, a, b);
#pragma unroll
    for (int k = 1; k < kHeadDim / 16; ++k) {
      Mma::template ss<true>(acc, a + k_step_along(k, kBlockN), b + k_step_along(k, kBlockM));
    }
    if constexpr (!Config::kExtended) {
      add_statistics(Element{}, acc, weights, statistics_descriptor(shared.statistics[q.stage]));
    }
    wgmma_commit();
  }

  /// acc (64 key rows x kHeadDim) += fragment (64 x kBlockM) block (kBlockM rows of dO or Q).
  FLASH_ATTN_DEVICE void issue_accumulate(float (&acc)[kHeadDim / 2], const uint32_t* fragment, const uint8_t* block) {
    const uint32_t b = descriptor_across(block, kBlockM);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockM / 16; ++k) Mma::template rs<true>(acc, fragment + 4 * k, b + k_step_across(k));
    wgmma_commit();
  }

  /// dQ = dS K: this warpgroup's 64 of kHeadDim columns, or 64 of kBlockM rows.
  FLASH_ATTN_DEVICE void issue_dq() {
    constexpr bool kHalfOfColumns = kBlockM == 64;
    const uint32_t a = descriptor(shared.ds[step % 2]) + (kHalfOfColumns ? 0 : warpgroup * (64 * 128 / 16));
    const uint32_t b = descriptor_across(
        shared.k[tiles.stage_kv()] + (kHalfOfColumns ? warpgroup * Config::kPanelBytesKV : 0), kBlockN);
    if constexpr (Config::kDqPath != DqPath::kOneCta) wgmma_discard(dq);
    wgmma_fence();
    Mma::template ss<Config::kDqPath == DqPath::kOneCta, kColumns, kRows>(dq, a, b);
#pragma unroll
    for (int k = 1; k < kBlockN / 16; ++k) {
      Mma::template ss<true, kColumns, kRows>(dq, a + k_step_along(k, kBlockM), b + k_step_across(k));
    }
    wgmma_commit();
  }

  // -- the pieces of a step

  FLASH_ATTN_DEVICE void pack_fragment(uint32_t (&to)[kFragment / 2], const float (&from)[kFragment]) {
#pragma unroll
    for (int i = 0; i < kFragment / 2; ++i) to[i] = pack<Element>(from[2 * i], from[2 * i + 1]);
  }

  /// To the operand of dQ, transposed back: [kBlockM][64 key rows of this warpgroup].
  FLASH_ATTN_DEVICE void store_ds() {
    const uint32_t row =
        shared_address(shared.ds[step % 2]) + warpgroup * Config::kPanelBytesQ + ds_store_offset(warp, lane);
#pragma unroll
    for (int k = 0; k < kBlockM / 16; ++k) stmatrix_x4_transposed(row + k * 2048, ds + 4 * k);
    async_proxy_fence();  // wgmma reads it, after kDsReady
  }

  FLASH_ATTN_DEVICE DqRows<Config> dq_rows() const { return {params, shared, warpgroup, warp, lane}; }

  /// Where this thread adds up its part of dQ, as float4s 32 apart.
  FLASH_ATTN_DEVICE float4* dq_sum(const Tile& tile, int head, int m_block) const {
    const int64_t block = Config::kDqPath == DqPath::kOneCta
                              ? (int64_t{blockIdx.x} * tile.num_heads + head) * params.num_m_blocks + m_block
                              : tile.block + head * params.num_blocks + m_block;
    return reinterpret_cast<float4*>(params.dq_accum + (block * Config::kConsumers + warpgroup) * kDqTile +
                                     warp * (kDqTile / 4)) +
           lane;
  }

  /// What this thread has stored for the tiles before, as the start of the product.
  FLASH_ATTN_DEVICE void load_dq(const Tile& tile, int head, int m_block) {
    const bool first = tile.n_begin == 0;
    const float4* const sum = dq_sum(tile, head, m_block);
#pragma unroll
    for (int i = 0; i < kDqSize; i += 4) {
      const float4 x = first ? float4{0.f, 0.f, 0.f, 0.f} : __ldcg(sum + i / 4 * 32);
      dq[i] = x.x;
      dq[i + 1] = x.y;
      dq[i + 2] = x.z;
      dq[i + 3] = x.w;
    }
  }

  /// Hands this warp's quarter of dQ to the dQ warp, or takes it to global memory itself.
  FLASH_ATTN_DEVICE void emit_dq(const Tile& tile, int head, int m_block, bool first) {
    if constexpr (Config::kDqPath == DqPath::kWarp) {
      const uint32_t to = shared_address(shared.dq[warpgroup]) + (warp * (kDqTile / 4) + lane * 4) * sizeof(float);
      mbarrier_wait(&shared.dq_empty[warpgroup], (step & 1) ^ 1);  // the last step's has left
#pragma unroll
      for (int i = 0; i < kDqSize; i += 4) store_shared(to + i / 4 * 512, dq + i);
      async_proxy_fence();
      named_barrier_arrive(kDqReady + warpgroup, 160);
    } else if constexpr (Config::kDqPath == DqPath::kOneCta) {
      const int last_row = min((m_block + 1) * kBlockM, static_cast<int>(params.problem.seqlen_q)) - 1;
      if (tile.n_begin + kBlockN > tile.band().last_column(last_row)) {  // no later tile adds to it
        dq_rows().store(dq, tile.q_batch, tile.q_head + head, m_block * kBlockM, params.problem.seqlen_q);
      } else {
        float4* const sum = dq_sum(tile, head, m_block);
#pragma unroll
        for (int i = 0; i < kDqSize; i += 4)
          __stcg(sum + i / 4 * 32, make_float4(dq[i], dq[i + 1], dq[i + 2], dq[i + 3]));
      }
    } else {
      take_turn(params, shared.dq_turns, step, first, reinterpret_cast<float*>(dq_sum(tile, head, m_block)), dq);
    }
  }

  // -- rows of later tiles, see preprocess/prepared_rows.h

  /// delta of the rows whose out and dO are in this stage.
  FLASH_ATTN_DEVICE void compute_deltas(float* to) {
    const int thread = 128 * warpgroup + 32 * warp + lane_id();
    using Rows = PreparedRows<Element, 128 * Config::kConsumers, kBlockM, Config::kPanels>;
    const int panel = Rows::panel(thread), offset = panel * Config::kPanelBytesQ;
    const float delta =
        Rows::delta(shared.q[q.stage] + offset, shared.dout[q.stage] + offset, thread, panel < params.panels_v);
    if (thread % Rows::kThreadsOfRow == 0) to[thread / Rows::kThreadsOfRow] = delta;
  }

  /// While K and V are on their way.
  FLASH_ATTN_DEVICE void prepare_rows(const Tile& tile) {
    const int blocks = tile.prepared_blocks;
    mbarrier_wait(&shared.deltas_empty, (tiles.count & 1) ^ 1);
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) {
      mbarrier_wait(&shared.q_full[q.stage], q.phase);
      mbarrier_wait(&shared.dout_full[q.stage], q.phase);
      compute_deltas(shared.deltas + i * kBlockM);
      named_barrier_sync(kDsReady, 256);  // all have read
      release(&shared.q_empty[q.stage]);
      release(&shared.dout_empty[q.stage]);
      q.advance();
    }
    mbarrier_arrive(&shared.deltas_full);
  }

  /// One thread releases for its warpgroup: its own wait for the product that read implies the others'.
  FLASH_ATTN_DEVICE void release(uint64_t* barrier) {
    if (threadIdx.x % 128 == 0) mbarrier_arrive(barrier);
  }

  // -- the hot loop

  FLASH_ATTN_DEVICE void process_step(const Tile& tile, int head, int m_block, bool mask, int previous_q) {
    mbarrier_wait(&shared.q_full[q.stage], q.phase);
    issue_transposed(s, shared.k[tiles.stage_kv()], shared.q[q.stage], lse_weights_descriptor(shared.weights));
    // Not before S: the copies come in the order of their use: benchmarks/experiments/054.
    mbarrier_wait(&shared.v_full[tiles.stage_kv()], tiles.phase_kv());
    mbarrier_wait(&shared.dout_full[q.stage], q.phase);
    issue_transposed(dp, shared.v[tiles.stage_kv()], shared.dout[q.stage], delta_weights_descriptor(shared.weights));
    wgmma_wait<1>();  // S, and dK of the last step
    wgmma_results(s);
    wgmma_results(dk);
    if (Config::kDkInFlight && previous_q >= 0) release(&shared.q_empty[previous_q]);
#pragma unroll
    for (int i = 0; i < kFragment; ++i) s[i] = probability(s[i] * params.scale_log2);
    // ptxas would sink the exponentials below the wait for dP; this branch keeps them under it.
    if (mask) {
      mask_transposed(s, tile, tile.n_begin + 64 * warpgroup + 16 * warp + lane / 4,
                      m_block * kBlockM + 2 * (lane % 4));
    }
    if constexpr (Config::kDqPath == DqPath::kOneCta) load_dq(tile, head, m_block);
    wgmma_wait<0>();
    wgmma_results(dp);
#pragma unroll
    for (int i = 0; i < kFragment; ++i) dp[i] *= s[i];
    pack_fragment(p, s);
    pack_fragment(ds, dp);
    store_ds();
    issue_accumulate(dv, p, shared.dout[q.stage]);
    named_barrier_sync(kDsReady, 256);  // both halves of dS; also, dQ of the last step has read the other buffer
    issue_dq();
    issue_accumulate(dk, ds, shared.q[q.stage]);
    const bool first = Config::kDqPath == DqPath::kRegisters && await_turn(params, shared.dq_turns, step);
    wgmma_wait<1>();  // dV and dQ
    wgmma_results(dv);
    wgmma_results(dq);
    release(&shared.dout_empty[q.stage]);
    emit_dq(tile, head, m_block, first);
    if constexpr (!Config::kDkInFlight) {
      wgmma_wait<0>();
      wgmma_results(dk);
      release(&shared.q_empty[q.stage]);
    }
    ++step;
    q.advance();
  }

  FLASH_ATTN_DEVICE void process_tile(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;
    const IntRange full = tile.band().template full_row_blocks<kBlockM>(tile.n_begin + 64 * warpgroup);
    int previous_q = -1;  // stage that dK in flight still reads
    mbarrier_wait(&shared.k_full[tiles.stage_kv()], tiles.phase_kv());
    for_each_run<Config>(tile, [&](int head, int m_block, int m_end, int m_step) {
#pragma unroll 1
      for (; m_block != m_end; m_block += m_step) {
        const int stage = q.stage;
        process_step(tile, head, m_block, !full.holds(m_block), previous_q);
        previous_q = stage;
      }
    });
    forget_derived(tiles.count);
    if constexpr (Config::kDqPath == DqPath::kRegisters) mbarrier_arrive(&shared.dq_added[tiles.slot()]);
    wgmma_wait<0>();
    wgmma_results(dk);
    if (Config::kDkInFlight && previous_q >= 0) release(&shared.q_empty[previous_q]);
  }

  // -- epilogue

  /// This warp's 16 rows of dK or dV, or of what rounding leaves of them, through its own rows of a buffer, so that TMA
  /// writes whole rows.
  FLASH_ATTN_DEVICE void store_rows(const float (&acc)[kHeadDim / 2], float scale, int panels, uint8_t* buffer,
                                    const CUtensorMap& map, const Tile& tile, bool rest) {
    const int row = 64 * warpgroup + 16 * warp;
    const uint32_t staging = shared_address(buffer) + row * 128;
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j) {
      if (j / 4 >= panels) continue;  // these stay zero for the next tile
      const auto pair = [&](int i) {
        const auto packed = rest ? pack_rest<Element> : pack<Element>;
        return packed(acc[8 * j + i] * scale, acc[8 * j + i + 1] * scale);
      };
      const int chunk = swizzled_chunk(j % 4 * 2 + lane / 16, lane);
      stmatrix_x4(staging + j / 4 * Config::kPanelBytesKV + lane % 16 * 128 + chunk * 16, pair(0), pair(2), pair(4),
                  pair(6));
    }
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) {
      for (int panel = 0; panel < panels; ++panel) {
        tma_store(&map, staging + panel * Config::kPanelBytesKV,
                  {64 * panel, tile.dkv_x + row, tile.dkv_y, tile.dkv_head + rest, tile.kv_batch});
      }
    }
  }

  FLASH_ATTN_DEVICE void store_gradient(const float (&acc)[kHeadDim / 2], float scale, int panels, uint8_t* buffer,
                                        const CUtensorMap& map, const Tile& tile) {
    store_rows(acc, scale, panels, buffer, map, tile, false);
    if constexpr (Config::kRowParts) {
      if (lane == 0) {
        tma_store_commit();
        tma_store_wait_read();
      }
      __syncwarp();
      store_rows(acc, scale, panels, buffer, map, tile, true);
    }
  }

  FLASH_ATTN_DEVICE void store_tile(const Tile& tile, float dv_scale = 1.f) {
    if (params.wants_dv) store_gradient(dv, dv_scale, params.panels_v, shared.v[tiles.stage_kv()], params.dv, tile);
    named_barrier_sync(kDsReady, 256);  // both consumers have read all of K
    if (params.wants_dk) {
      store_gradient(dk, params.softmax_scale, params.panels, shared.k[tiles.stage_kv()], params.dk, tile);
    }
    if (lane == 0) {
      tma_store_commit();
      tma_store_wait_read();
      mbarrier_arrive(&shared.kv_empty[tiles.stage_kv()]);
    }
    mbarrier_arrive(&shared.tile_empty[tiles.slot()]);
    __syncwarp();
  }

  FLASH_ATTN_DEVICE void run() {
    while (true) {
      mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
      const Tile& tile = shared.tiles[tiles.slot()];
      if (tile.num_heads < 0) break;
      if (params.preparation.enabled()) prepare_rows(tile);
      process_tile(tile);
      store_tile(tile);
      ++tiles.count;
    }
    if (Config::kDqPath != DqPath::kOneCta && params.dq_writing.enabled()) dq_rows().write_last_shares();
    if (lane == 0) tma_store_wait();  // shared memory must outlive the stores
  }
};

}  // namespace flash_attn::cuda::sm90::backward::single
