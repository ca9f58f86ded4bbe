// A consumer warpgroup of the forward kernel: 64 query rows, from S to out.
#pragma once

#include "../../common/scores/mask_fragment.h"
#include "../../common/swizzle.h"
#include "../hopper/barriers.h"
#include "../hopper/cluster.h"
#include "../hopper/stmatrix.h"
#include "../hopper/tma.h"
#include "config.h"
#include "parts.h"

namespace flash_attn::cuda::sm90::forward {

template <typename Config>
struct Consumer {
  using Element = typename Config::Element;
  using Mma = Wgmma<Element>;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  static constexpr int kConsumers = Config::kConsumers;

  const typename Config::Params& params;
  SharedStorage<Config>& shared;
  const int warpgroup, warp, lane;
  typename Config::Softmax softmax;
  float s[kBlockN / 2];              // S, then P, of the block at hand
  float out[Config::kHeadDimV / 2];  // O, not yet divided by row_sum
  uint32_t p[kBlockN / 4];           // P as the A operand of P V
  TileRing<Config> tiles;
  Ring<Config::kStagesKV> k, v;
  int out_stage = -1;   // stage of Q that holds the last tile's out until TMA has read it
  ColumnBlocks blocks;  // that this warpgroup's rows see

  // -- matrix products

  FLASH_ATTN_DEVICE static uint32_t operand(const void* tile) {
    return Config::kCluster ? cluster_descriptor(tile) : descriptor(tile);
  }

  FLASH_ATTN_DEVICE void issue_qk() {
    const uint32_t a = operand(shared.q[tiles.stage()]) + warpgroup * (64 * 128 / 16);
    const uint32_t b = operand(shared.k[k.stage]);
    wgmma_fence();
    Mma::template ss<false>(s, a, b);
#pragma unroll
    for (int step = 1; step < (Config::kHeadDim + 15) / 16; ++step) {
      Mma::template ss<true>(s, a + k_step_along(step, kBlockM), b + k_step_along(step, kBlockN));
    }
    wgmma_commit();
  }

  FLASH_ATTN_DEVICE void issue_pv() {
    const uint32_t b = operand(shared.v[v.stage]) | kBlockN * 8 << 16;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kBlockN / 16; ++step) Mma::template rs<true>(out, p + 4 * step, b + k_step_across(step));
    wgmma_commit();
  }

  FLASH_ATTN_DEVICE void pack_p() {
#pragma unroll
    for (int i = 0; i < kBlockN / 4; ++i) p[i] = pack<Element>(s[2 * i], s[2 * i + 1]);
  }

  FLASH_ATTN_DEVICE void rescale_out() {
    if (!softmax.grown) return;
#pragma unroll
    for (int i = 0; i < Config::kHeadDimV / 2; ++i) out[i] *= softmax.rescale[i / 2 % 2];
  }

  // -- waiting and releasing. One thread releases for its warpgroup: its own wait for a product implies the others'.

  FLASH_ATTN_DEVICE void wait_k() { mbarrier_wait(&shared.k_full[k.stage], k.phase); }
  FLASH_ATTN_DEVICE void wait_v() { mbarrier_wait(&shared.v_full[v.stage], v.phase); }
  FLASH_ATTN_DEVICE void release_k() {
    if (threadIdx.x % 128 == 0) mbarrier_arrive(&shared.k_empty[k.stage]);
    k.advance();
  }
  FLASH_ATTN_DEVICE void release_v() {
    if (threadIdx.x % 128 == 0) mbarrier_arrive(&shared.v_empty[v.stage]);
    v.advance();
  }
  /// The producer may overwrite the Q stage that the last tile's out went through.
  FLASH_ATTN_DEVICE void release_out_stage() {
    if (out_stage < 0) return;
    if (lane == 0) {
      tma_store_wait_read();
      mbarrier_arrive(&shared.q_empty[out_stage]);
    }
    out_stage = -1;
  }

  // Consumer i waits for its turn until i - 1 has issued its products, and then lets i + 1 issue.
  FLASH_ATTN_DEVICE void begin_issue() { named_barrier_sync(kIssue + warpgroup, 256); }
  FLASH_ATTN_DEVICE void end_issue() {
    named_barrier_arrive(kIssue + (warpgroup + 1 == kConsumers ? 0 : warpgroup + 1), 256);
  }

  /// Blocks that other warpgroups of the tile need. Only the warp that releases them waits for them: the next block
  /// that the others wait for is not released before a product of all four.
  FLASH_ATTN_DEVICE void skip_blocks(int count) {
    constexpr int kUnroll = Config::kMasked ? 1 : 4;  // benchmarks/experiments/009
#pragma unroll kUnroll
    for (; count > 0; --count) {
      begin_issue();
      end_issue();
      if (warp == 0) {
        wait_k();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&shared.k_empty[k.stage]);
        wait_v();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&shared.v_empty[v.stage]);
      }
      k.advance();
      v.advance();
    }
  }

  // -- masking

  /// -inf for columns that a row does not see; `row` is the warpgroup's first.
  FLASH_ATTN_DEVICE void mask_block(const Tile& tile, int row, int n_block) {
    mask_scores<Config::kMasked>(s, tile.band(), blocks, n_block, row + warp * 16 + lane / 4,
                                 n_block * kBlockN + 2 * (lane % 4));
  }

  // -- the hot loop

  FLASH_ATTN_DEVICE void process_first_block(const Tile& tile, int row, int n_block) {
    wait_k();
    begin_issue();
    issue_qk();
    end_issue();
    release_out_stage();
    wgmma_wait<0>();
    wgmma_results(s);
    release_k();
    if (blocks.is_partial(n_block)) mask_block(tile, row, n_block);
    softmax.start(s);
    pack_p();
  }

  /// S and softmax of this block, under them O += P V of the one before.
  FLASH_ATTN_DEVICE void process_block(const Tile& tile, int row, int n_block) {
    wait_k();
    begin_issue();
    issue_qk();
    wait_v();
    issue_pv();
    end_issue();
    wgmma_wait<1>();
    wgmma_results(s);
    const bool edge = Config::kMasked && blocks.is_partial(n_block);
    if constexpr (Config::kLazyMax) {
      bool again = edge;
      if (!edge && !softmax.advance_lazily(s, kVote + warpgroup)) {
        wgmma_wait<0>();  // K is still held
        wgmma_results(out);
        wgmma_results(s);
        issue_qk();
        wgmma_wait<0>();
        wgmma_results(s);
        again = true;
      }
      if (again) {
        if (edge) mask_block(tile, row, n_block);
        softmax.advance(s);
      }
      release_k();
    } else {
      release_k();
      if (edge) mask_block(tile, row, n_block);
      softmax.advance(s);
    }
    wgmma_wait<0>();
    wgmma_results(out);
    release_v();
    pack_p();
    rescale_out();
  }

  FLASH_ATTN_DEVICE void finish_last_pv() {
    wait_v();
    issue_pv();
    wgmma_wait<0>();
    wgmma_results(out);
    release_v();
  }

  // -- epilogue

  /// Divides O by the sum and writes out and lse; `row` is the warp's first.
  FLASH_ATTN_DEVICE void store_tile(const Tile& tile, int row) {
    store_sums(tile, row, softmax.row_max, [&](int r) { return quad_sum(softmax.row_sum[r]); });
  }

  /// The same of rows whose maxima and sums are these.
  template <typename Sum>
  FLASH_ATTN_DEVICE void store_sums(const Tile& tile, int row, const float (&row_max)[2], Sum sum_of) {
    float lse[2], inverse[2];
    bool empty[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_of(r);
      empty[r] = sum == 0.f || row + lane / 4 + 8 * r >= tile.seqlen_q;
      lse[r] = empty[r] ? -INFINITY : log_sum_exp(row_max[r], params.to_natural, sum);
      inverse[r] = __fdividef(1.f, sum);
    }
    store_rows(tile, row, lse, inverse, empty);
  }

  /// The same of rows of which lse, what to multiply O by, and whether out is 0 are known.
  FLASH_ATTN_DEVICE void store_rows(const Tile& tile, int row, const float (&lse)[2], float (&inverse)[2],
                                    const bool (&empty)[2]) {
    if (__any_sync(~0u, empty[0] || empty[1])) {  // selected, not multiplied by 0: O may hold NaN here
#pragma unroll
      for (int i = 0; i < Config::kHeadDimV / 2; ++i) out[i] = empty[i / 2 % 2] ? 0.f : out[i] * inverse[i / 2 % 2];
      inverse[0] = inverse[1] = 1.f;
    }
    store_out(tile, row, inverse);
    // After store_out, whose proxy fence would wait for these stores.
    const RowView& view = params.problem.lse;
    float* const lse_row = static_cast<float*>(view.data) + tile.batch * view.batch + tile.head * view.head +
                           (int64_t{tile.q_row} + row + lane / 4) * view.row;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (lane % 4 == 0 && row + lane / 4 + 8 * r < tile.num_rows) lse_row[8 * r * view.row] = lse[r];
    }
  }

  /// O goes through shared memory, so that TMA writes whole rows; each warp stores its own 16.
  FLASH_ATTN_DEVICE void store_out(const Tile& tile, int row, const float (&inverse)[2]) {
    const uint32_t staging = Config::kOutBuffer
                                 ? shared_address(shared.out[4 * warpgroup + warp])
                                 : shared_address(shared.q[tiles.stage()]) + (64 * warpgroup + 16 * warp) * 128;
    const uint32_t staging_row = staging + lane % 16 * 128;  // whose address this lane gives to stmatrix
    const int x = tile.out_x + row - tile.m_begin;
    const auto pair = [&](int i) {
      return pack<Element>(out[i] * inverse[i / 2 % 2], out[i + 1] * inverse[i / 2 % 2]);
    };
#pragma unroll
    for (int first = 0; first < Config::kPanelsV; first += Config::kOutPanels) {
      if constexpr (Config::kOutBuffer) {
        if (lane == 0) tma_store_wait_read();  // the last panels have left the buffer
        __syncwarp();
      }
#pragma unroll
      for (int j = 0; j < 4 * Config::kOutPanels; ++j) {  // 16 columns each
        const int i = 8 * (4 * first + j);
        if (i >= Config::kHeadDimV / 2) continue;
        const int chunk = swizzled_chunk(j % 4 * 2 + lane / 16, lane);
        stmatrix_x4(staging_row + j / 4 * Config::kPanelBytesOut + chunk * 16, pair(i), pair(i + 2), pair(i + 4),
                    pair(i + 6));
      }
      async_proxy_fence();
      __syncwarp();
      if (lane == 0) {
#pragma unroll
        for (int panel = first; panel < first + Config::kOutPanels; ++panel) {
          if (panel >= params.panels_v) break;
          tma_store(&params.out, staging + (panel - first) * Config::kPanelBytesOut,
                    {64 * panel, x, tile.out_y, tile.head, tile.q_batch});
        }
        tma_store_commit();
      }
    }
  }

  /// One part of a split tile, for combine.h; `row` is this thread's first, of the partial results.
  FLASH_ATTN_DEVICE void store_partial(int64_t row) {
    float* const partial = params.schedule.partial_out + row * Config::kHeadDimV + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < Config::kHeadDimV / 2; i += 2) {
      *reinterpret_cast<float2*>(partial + i / 2 % 2 * 8 * Config::kHeadDimV + 8 * (i / 4)) = {out[i], out[i + 1]};
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(softmax.row_sum[r]);
      if (lane % 4 == 0) params.schedule.partial_statistics[row + 8 * r] = {softmax.row_max[r], sum};
    }
  }

  // -- tiles

  FLASH_ATTN_DEVICE void process_tile(const Tile& tile) {
    const int row = tile.m_begin + 64 * warpgroup;
    if (row >= tile.num_rows) {
      skip_blocks(tile.num_blocks);
      release_out_stage();
    } else {
      blocks = column_blocks<kBlockN, Config::kMasked>(tile.band(), row, tile.num_blocks);
      const int begin = blocks.begin, end = blocks.end;
      skip_blocks(tile.num_blocks - end);
#pragma unroll
      for (int i = 0; i < Config::kHeadDimV / 2; ++i) out[i] = 0.f;
      process_first_block(tile, row, end - 1);
      for (int n_block = end - 2; n_block >= begin; --n_block) process_block(tile, row, n_block);
      if constexpr (Config::kOutBuffer) {
        if (lane == 0) mbarrier_arrive(&shared.q_empty[tiles.stage()]);  // read for the last time
      }
      finish_last_pv();
      skip_blocks(begin);
      if constexpr (!Config::kCluster) {
        if (tile.partial_row < 0) {
          store_tile(tile, row + 16 * warp);
        } else {
          store_partial(tile.partial_row + 64 * warpgroup + 16 * warp + lane / 4);
        }
      }
    }
    if constexpr (Config::kCluster)
      combine_parts<Config>(*this, tile, row + 16 * warp);  // with those that have no rows
    if (!Config::kOutBuffer) {
      out_stage = tiles.stage();
    } else if (row >= tile.num_rows) {
      if (lane == 0) mbarrier_arrive(&shared.q_empty[tiles.stage()]);
    }
  }

  FLASH_ATTN_DEVICE void run() {
    if (warpgroup == kConsumers - 1) end_issue();  // the first turn is consumer 0's
    for (;; ++tiles.count) {
      mbarrier_wait(&shared.q_full[tiles.stage()], tiles.phase());
      const Tile& tile = shared.tiles[tiles.slot()];
      if (tile.num_blocks == 0) break;
      process_tile(tile);
    }
    if (lane == 0) tma_store_wait();  // shared memory must outlive the stores
  }
};

}  // namespace flash_attn::cuda::sm90::forward
