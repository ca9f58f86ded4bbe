// The third warpgroup of backward_pair_kernel.h: one thread copies tiles to shared memory, two see to the order in
// which tiles add to dQ, or three warps write dq, of which one first finishes the rows that the tile prepares.
#pragma once

#include "backward_pair_config.h"

namespace flash_attn::sm90 {

// ---- producer

/// Whether the sequence reaches the key rows of CTA `rank`, and a query row sees the tile at all.
SM90_DEVICE bool has_rows(const BackwardTile& tile, int rank) {
  return tile.m_begin < tile.m_end && tile.n_begin + 64 * rank < tile.seqlen_k;
}

template <typename Config>
struct BackwardPairProducer {
  const BackwardKernelParams& params;
  BackwardPairStorage<Config>& shared;
  const int rank;

  SM90_DEVICE void load_panels(uint8_t* buffer, const CUtensorMap& map, uint64_t* full, int first, int end, int x,
                               int y, int head, int batch) {
    for (int panel = first; panel < end; ++panel) {
      tma_load(buffer + (panel - first) * Config::kPanelBytes, &map, full, {64 * panel, x, y, head, batch});
    }
  }

  /// Panels [first, end) of the key rows of CTA `of`, or none if no rows are there: the kernel has zeroed them then.
  SM90_DEVICE void load_kv(uint8_t* buffer, const CUtensorMap& map, uint64_t* full, int first, int end, int of) {
    const BackwardTile& tile = shared.tile;
    if (!has_rows(tile, of)) return;
    load_panels(buffer, map, full, first, end, tile.kv_x + of * Config::kRowsN, tile.kv_y, tile.kv_head, tile.kv_batch);
  }

  SM90_DEVICE void load_v() {
    mbarrier_arrive_expect(&shared.v_full, has_rows(shared.tile, rank) ? params.panels_v * Config::kPanelBytes : 0);
    load_kv(shared.v, params.v, &shared.v_full, 0, params.panels_v, rank);
  }

  SM90_DEVICE void load_k() {
    const int peer_first = 2 * rank, peer_end = min(peer_first + 2, params.panels);
    const int own = has_rows(shared.tile, rank) ? params.panels : 0;
    const int peer = has_rows(shared.tile, rank ^ 1) ? max(0, peer_end - peer_first) : 0;
    mbarrier_arrive_expect(&shared.k_full, (own + peer) * Config::kPanelBytes);
    load_kv(shared.k, params.k, &shared.k_full, 0, params.panels, rank);
    load_kv(shared.k_peer, params.k, &shared.k_full, peer_first, peer_end, rank ^ 1);
  }

  SM90_DEVICE void load_q(int step, int head, int m_block) {
    const BackwardTile& tile = shared.tile;
    uint64_t* const full = &shared.q_full[step % 2];
    mbarrier_wait(&shared.q_empty[step % 2], step / 2 % 2 ^ 1);
    mbarrier_arrive_expect(full, params.panels * Config::kPanelBytes + Config::kBytesStatistics);
    load_panels(shared.q[step % 2], params.q, full, 0, params.panels, tile.q_x + m_block * Config::kBlockM, tile.q_y,
                tile.q_head + head, tile.q_batch);
  }

  SM90_DEVICE void load_statistics(int step, int head, int m_block) {
    const int64_t block = shared.tile.block + head * params.num_blocks + m_block;
    bulk_load(shared.statistics[step % 2], params.statistics + block * Config::kBlockM, Config::kBytesStatistics,
              &shared.q_full[step % 2]);
  }

  SM90_DEVICE void load_dout(int step, int head, int m_block) {
    const BackwardTile& tile = shared.tile;
    mbarrier_wait(&shared.dout_empty, step % 2 ^ 1);
    mbarrier_arrive_expect(&shared.dout_full, params.panels_v * Config::kPanelBytes);
    load_panels(shared.dout, params.dout, &shared.dout_full, 0, params.panels_v, tile.q_x + m_block * Config::kBlockM,
                tile.q_y, tile.q_head + head, tile.q_batch);
  }

  // -- rows of later tiles, see backward_prepare.h

  /// out and dO of a block, to buffers that the first step does not use at its start.
  SM90_DEVICE void load_prepared(int index) {
    const PreparedPlace at = prepared_place(params, index);
    const int row = at.m_block * Config::kBlockM;
    uint64_t* const full = &shared.prepared_full;
    mbarrier_arrive_expect(full, 2 * params.panels_v * Config::kPanelBytes);
    load_panels(shared.q[1], params.preparation.out, full, 0, params.panels_v, row, params.seqlen_q, at.head, at.batch);
    for (int panel = 0; panel < params.panels_v; ++panel) {
      tma_load(prepared_dout(shared, panel), &params.dout, full, {64 * panel, row, params.seqlen_q, at.head, at.batch});
    }
  }

  SM90_DEVICE void load_first_prepared_and_v() {
    if (shared.tile.prepared_begin + rank < shared.tile.prepared_end) load_prepared(shared.tile.prepared_begin + rank);
    load_v();
  }

  /// Until the consumers are through with all of them.
  SM90_DEVICE void load_other_prepared() {
    int done = 0;
    for (int index = shared.tile.prepared_begin + rank; index < shared.tile.prepared_end; index += 2, ++done) {
      if (done > 0) load_prepared(index);
      mbarrier_wait(&shared.prepared_empty, done % 2);
    }
  }

  SM90_DEVICE void run() {
    const BackwardTile& tile = shared.tile;
    load_k();
    if (tile.m_begin == tile.m_end) load_first_prepared_and_v();
    int step = 0;
    for (int head = 0; head < tile.num_heads; ++head) {
      for (int m_block = tile.m_begin; m_block < tile.m_end; ++m_block, ++step) {
        if (step == 1) load_other_prepared();
        load_q(step, head, m_block);
        if (step == 0) load_first_prepared_and_v();
        if (m_block == tile.m_begin && params.preparation.enabled()) {
          await_prepared(params.preparation, tile, head);
          global_proxy_fence();
        }
        load_statistics(step, head, m_block);
        load_dout(step, head, m_block);
      }
    }
    if (step <= 1) load_other_prepared();
    mbarrier_wait(&shared.dq_added, 0);
    say_added<Config>(params, tile, rank);
  }
};

// ---- preparation of rows

/// By a warp: zeros, and counts what consumers have prepared.
template <typename Config>
SM90_DEVICE void follow_preparation(const BackwardKernelParams& params, BackwardPairStorage<Config>& shared, int rank) {
  int done = 0;
#pragma unroll 1
  for (int index = shared.tile.prepared_begin + rank; index < shared.tile.prepared_end; index += 2, ++done) {
    if (lane_id() == 0) mbarrier_arrive(&shared.prepared_empty);  // so that no block is missed
    const PreparedPlace at = prepared_place(params, index);
    if (params.preparation.zeroes_dq) zero_block<Config::kDqPanels * kDqTile / 4>(params, at.block);
    __syncwarp();
    mbarrier_wait(&shared.prepared_empty, done % 2);
    if (lane_id() == 0) add_to_count(params.preparation.prepared + at.all_heads);
  }
}

// ---- dq writer

/// By several warps, each of which takes what is next: of the share of the tile at `index` in the order of tiles, the
/// columns that the CTAs of this rank compute (see backward_dq.h; here from registers to memory, for shared memory is
/// full).
template <typename Config>
SM90_DEVICE void write_pair_share(const BackwardKernelParams& params, BackwardPairStorage<Config>& shared, int rank,
                                  int index) {
  constexpr int kUnits = 8;  // of a block: a warp's 16 rows of a panel
  const BackwardTilePlace at = backward_tile_place(params, index);
  await_share<Config>(params, at, rank);
  DqShare& share = shared.shares[threadIdx.x / 32];  // there are few registers
  if (lane_id() == 0) {
    choose_share<Config>(params, at, share);
    share.pieces = 0;
  }
  __syncwarp();
  const auto next_unit = [&] {
    int next = 0;
    if (lane_id() == 0) next = atomicAdd(&shared.next_dq_unit, 1);
    return __shfl_sync(~0u, next, 0);
  };
  const auto units = [&] { return (share.end - share.begin) * kUnits; };  // of a head
  int taken = next_unit();
#pragma unroll 1
  for (int heads = params.group_size; heads > 0; --heads) {
#pragma unroll 1
    for (; taken - static_cast<int>(share.pieces) < units(); taken = next_unit()) {
      const int unit = share.begin * kUnits + taken - static_cast<int>(share.pieces), lane = lane_id();
      const int panel = 2 * rank + unit / 4 % 2, row = unit / kUnits * Config::kBlockM + unit % 4 * 16 + lane / 4;
      const int columns = min(static_cast<int>(params.problem.head_dim) - 64 * panel, 64);
      const int block = share.first_block + unit / kUnits;
      const float4* from = reinterpret_cast<const float4*>(params.dq_accum) +
                           int64_t{block * Config::kDqPanels + panel} * (kDqTile / 4) + unit % 4 * (kDqTile / 16) +
                           lane;
      uint16_t* to = static_cast<uint16_t*>(params.dq.data) + share.batch * params.dq.batch + row * params.dq.row +
                     share.q_head * params.dq.head + 64 * panel + 2 * (lane % 4);
#pragma unroll 1
      for (int left = columns; left > 0; left -= 16, from += 64, to += 16) {
        const float4 x[2] = {__ldcg(from), __ldcg(from + 32)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t upper =
              pack<typename Config::Element>(x[i].x * params.softmax_scale, x[i].y * params.softmax_scale);
          const uint32_t lower =
              pack<typename Config::Element>(x[i].z * params.softmax_scale, x[i].w * params.softmax_scale);
          if (8 * i < left && row < params.seqlen_q) *reinterpret_cast<uint32_t*>(to + 8 * i) = upper;
          if (8 * i < left && row + 8 < params.seqlen_q) {
            *reinterpret_cast<uint32_t*>(to + 8 * params.dq.row + 8 * i) = lower;
          }
        }
      }
    }
    __syncwarp();
    if (lane_id() == 0) {
      share.pieces += units();
      share.first_block += params.num_blocks;
      ++share.q_head;
    }
    __syncwarp();
  }
}

// ---- order of dQ

/// For consumer 0 (scores) or 1 (gradients).
template <typename Config>
SM90_DEVICE void order_pair_dq(const BackwardKernelParams& params, BackwardPairStorage<Config>& shared, int rank,
                               int consumer) {
  const BackwardTile& tile = shared.tile;
  const int panel = 2 * rank + consumer;
  if (panel >= Config::kPanels) return;
  uint32_t step = 0;
  for (int head = 0; head < tile.num_heads; ++head) {
    for (int m_block = tile.m_begin; m_block < tile.m_end; ++m_block, ++step) {
      const int64_t block = tile.block + head * params.num_blocks + m_block;
      take_turn(params.dq_turns + block * kDqTurns + panel,
                dq_turn<Config::kBlockM, Config::kBlockN>(params, tile, m_block), shared.dq_turns[consumer], step);
    }
  }
}

}  // namespace flash_attn::sm90
