// The third warpgroup of backward_pair_kernel.h: one thread copies tiles to shared memory, two see to the order in
// which tiles add to dQ, or three warps write dq.
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

  SM90_DEVICE void run() {
    const BackwardTile& tile = shared.tile;
    load_k();
    if (tile.m_begin == tile.m_end) load_v();
    int step = 0;
    for (int head = 0; head < tile.num_heads; ++head) {
      for (int m_block = tile.m_begin; m_block < tile.m_end; ++m_block, ++step) {
        const int stage = step % 2, x = tile.q_x + m_block * Config::kBlockM;
        uint64_t* const q_full = &shared.q_full[stage];
        mbarrier_wait(&shared.q_empty[stage], step / 2 % 2 ^ 1);
        mbarrier_arrive_expect(q_full, params.panels * Config::kPanelBytes + Config::kBytesStatistics);
        load_panels(shared.q[stage], params.q, q_full, 0, params.panels, x, tile.q_y, tile.q_head + head, tile.q_batch);
        const int64_t block = tile.block + head * params.num_blocks + m_block;
        bulk_load(shared.statistics[stage], params.statistics + block * Config::kBlockM, Config::kBytesStatistics,
                  q_full);
        if (step == 0) load_v();
        mbarrier_wait(&shared.dout_empty, step % 2 ^ 1);
        mbarrier_arrive_expect(&shared.dout_full, params.panels_v * Config::kPanelBytes);
        load_panels(shared.dout, params.dout, &shared.dout_full, 0, params.panels_v, x, tile.q_y, tile.q_head + head,
                    tile.q_batch);
      }
    }
    mbarrier_wait(&shared.dq_added, 0);
    say_added<Config>(params, tile, rank);
  }
};

// ---- dq writer

/// By `warps` warps, of which this is number `warp`: of the share of the tile at `index` in the order of tiles, the
/// columns that the CTAs of this rank compute (see backward_dq.h; here from registers to memory, for shared memory is
/// full).
template <typename Config>
SM90_DEVICE void write_pair_share(const BackwardKernelParams& params, BackwardPairStorage<Config>& shared, int rank,
                                  int index, int warp, int warps) {
  constexpr int kUnits = 8;  // of a block: a warp's 16 rows of a panel
  const BackwardTilePlace at = backward_tile_place(params, index);
  await_share<Config>(params, at, rank);
  const int lane = threadIdx.x % 32;
  DqShare& share = shared.shares[warp];  // there are few registers
  if (lane == 0) choose_share<Config>(params, at, share);
  __syncwarp();
#pragma unroll 1
  for (int head = 0; head < params.group_size; ++head) {
#pragma unroll 1
    for (int unit = share.begin * kUnits + warp; unit < share.end * kUnits; unit += warps) {
      const int panel = 2 * rank + unit / 4 % 2, row = unit / kUnits * Config::kBlockM + unit % 4 * 16 + lane / 4;
      const int columns = min(static_cast<int>(params.problem.head_dim) - 64 * panel, 64);
      const int block = share.first_block + head * params.num_blocks + unit / kUnits;
      const float4* from = reinterpret_cast<const float4*>(params.dq_accum) +
                           int64_t{block * Config::kDqPanels + panel} * (kDqTile / 4) + unit % 4 * (kDqTile / 16) +
                           lane;
      uint16_t* to = static_cast<uint16_t*>(params.dq.data) + share.batch * params.dq.batch + row * params.dq.row +
                     (share.q_head + head) * params.dq.head + 64 * panel + 2 * (lane % 4);
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
