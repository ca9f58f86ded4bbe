// Forward for float32 by warpgroups that take turns in products, so that one computes P while another's products run.
// Each owns 64 query rows; they share the tiles of K and V, which the four warps of one more warpgroup copy, one for
// each slot of a ring: K, V of the first tile, K, V of the second, ... A turn, for which P is there and which ends when
// all is issued:
//
//   wait for V     begin O += P V     wait for the next K     begin the next S
//
// Behind it a warpgroup waits for S and computes the next P. Sums leave the tensor core as everywhere in fp32; panels
// of P V and halves of S have two groups of registers in turn, of which one is read out while the other is computed.
#pragma once

#include "../../sm80/fp32/forward/kernel.h"
#include "turns.h"

namespace flash_attn::cuda::sm90::fp32 {

/// Base: a sm80::fp32::ForwardConfig of 4 kConsumers warps.
template <typename Base>
struct TurnsConfig : Base {
  using Order = Turns<Base::kWarps / 4, Base::kWarps == 8 ? 40 : 32>;
  static constexpr int kThreads = Order::kThreads, kSlots = kTurnSlots;
};

/// The loads of a slot, by one warp.
template <typename Config>
SM80_DEVICE void produce(const sm80::fp32::ForwardKernelParams& params, const sm80::fp32::ForwardPlace& tile,
                         uint32_t slots, SlotBarriers& barriers) {
  constexpr int kColumns = 2 * Config::kHeadDim, kBlockN = Config::kBlockN;
  const int number = threadIdx.x / 32 % 4, lane = lane_id();
  const uint32_t slot = slots + number * Config::kSlotBytes;
  const __half* const source = number % 2 == 0 ? tile.k_source : tile.v_source;
  const auto visited = [&](int block) { return sm80::fp32::visited_block<Config>(params, tile, block); };
  int block = visited(tile.block_end - 1);
  if (number >= 2) block = visited(block - 1);
  for (uint32_t phase = 0; block >= tile.block_begin; phase ^= 1) {
    const int first = block * kBlockN, begin = tile.col_begin - first, end = tile.col_end - first;
    mbarrier_wait(&barriers.empty[number], phase ^ 1);
    sm80::fp32::load_rows<typename Config::KeyTile, kBlockN, Config::kLoaded, 32>(
        slot, source + int64_t{first} * kColumns, lane, begin <= 0 && end >= kBlockN,
        [=](int row) { return row >= begin && row < end; });
    Config::Order::publish(barriers, number);
    block = visited(visited(block - 1) - 1);
  }
}

template <typename Config>
struct TurnsBlock : sm80::fp32::ForwardBlock<Config> {
  using Base = sm80::fp32::ForwardBlock<Config>;
  using Base::tile, Base::p, Base::params, Base::s, Base::o, Base::softmax, Base::kNTiles, Base::kBlockM, Base::kBlockN;
  using Order = typename Config::Order;
  static constexpr int kSlots = Config::kSlots, kPanels = Config::kHeadDim / 64;
  static constexpr bool kReduced = Config::Products::kReduced;
  static_assert(kPanels <= 2);

  SlotBarriers& barriers;
  const int warpgroup;  // the same register in all lanes

  SM80_DEVICE TurnsBlock(const sm80::fp32::ForwardKernelParams& kernel_params, const sm80::fp32::ForwardPlace& place,
                         uint32_t shared, SlotBarriers& of_slots, int number)
      : Base(kernel_params, place, shared), barriers(of_slots), warpgroup(number) {}

  SM80_DEVICE uint32_t own_q() const { return this->q_tile() + warpgroup * (64 * 128); }

  /// The warpgroup's rows.
  SM80_DEVICE void load_own_q() const {
    constexpr int kColumns = 2 * Config::kHeadDim;
    const int first = tile.m_begin + 64 * warpgroup, rows = int(tile.sequence.seqlen_q) - first;
    const __half* const source =
        params.q.head_data(this->is_packed_q(), tile.batch, tile.sequence.q_row + tile.m_begin, tile.head) +
        64 * warpgroup * kColumns;
    sm80::fp32::load_rows<typename Config::QueryTile, 64, Config::kLoaded, 128>(
        own_q(), source, threadIdx.x % 128, rows >= 64, [rows](int row) { return row < rows; });
    Order::publish_own(warpgroup);
  }

  // Loads are numbered: K and V of the first tile are 0 and 1.
  SM80_DEVICE uint32_t slot(int number) const {
    return this->slots_begin() + uint32_t(number) % kSlots * Config::kSlotBytes;
  }
  SM80_DEVICE void wait_full(int number) const {
    mbarrier_wait(&barriers.full[uint32_t(number) % kSlots], uint32_t(number) / kSlots % 2);
  }
  SM80_DEVICE void release(int number) const { Order::release(barriers, uint32_t(number) % kSlots); }

  SM80_DEVICE void start_half(FlatScores<kNTiles>& sum, int k, int half) const {
    wgmma_discard(sum);
    wgmma_fence();
    issue_half<kReduced, Config::kHeadDim, kBlockM, kBlockN, kNTiles>(sum, uniform(own_q() >> 4), uniform(slot(k) >> 4),
                                                                      half);
    wgmma_commit();
  }

  /// S of load `k`, of which all is issued.
  SM80_DEVICE void finish_scores(FlatScores<kNTiles>& later, int k) {
    wgmma_wait<0>();
    release(k);
    finish_rows(s, later);
  }

  /// As sm80::fp32::ForwardBlock::process(). V of the tile is load `v`.
  template <bool kNext>
  SM80_DEVICE void process(int v, int block, int next) {
    const int col = block * kBlockN;
    float score_unit = this->q_unit * this->k_unit;
    const float value_unit = this->v_unit / sm80::fp32::kPScale;
    if constexpr (kNext) this->load_units(next);
    if constexpr (Config::kExtended) {
      this->apply_rules(col, score_unit);
      score_unit = 1.f;
    }
    if (col < tile.full_begin || col + kBlockN > tile.full_end) {
      mask_columns(s, this->place(col), ColumnBounds(p, tile.sequence));
    }
    float factor[1][2];
    if (softmax.advance(s, score_unit, factor)) this->rescale(factor);
    if constexpr (Config::kExtended) this->drop(col);
    PairFragment pairs[kNTiles / 2][1];
    split_fragments(s, pairs, [](int, int) { return sm80::fp32::kPScale; });
    const auto unit = [=](int, int) { return value_unit; };

    wait_full(v);
    Order::begin(warpgroup);
    float sum[kPanels][32];
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      wgmma_fence();
      start_columns<kReduced, Config::kHeadDim>(sum[panel], pairs, slot(v), 64 * panel);
    }
    if constexpr (!kNext) {
      Order::end(warpgroup);
      wgmma_wait<0>();
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) finish_columns(o, sum[panel], 64 * panel, unit);
      return;
    }
    FlatScores<kNTiles> later;
    wait_full(v + 1);
    if constexpr (kPanels == 2) {
      wgmma_wait<1>();
      finish_columns(o, sum[0], 0, unit);
    }
    start_half(flat(s), v + 1, 0);
    wgmma_wait<1>();
    release(v);
    finish_columns(o, sum[kPanels - 1], 64 * (kPanels - 1), unit);
    start_half(later, v + 1, 1);
    Order::end(warpgroup);
    finish_scores(later, v + 1);
  }

  SM80_DEVICE void run() {
    load_own_q();
    Order::open(warpgroup);
    int block = this->load_block;
    if (block >= tile.block_begin) {
      this->load_units(block);
      FlatScores<kNTiles> later;
      wait_full(0);
      Order::begin(warpgroup);
      start_half(flat(s), 0, 0);
      start_half(later, 0, 1);
      Order::end(warpgroup);
      finish_scores(later, 0);
      int v = 1;
      for (int next = this->visited_block(block - 1); next >= tile.block_begin; next = this->visited_block(block - 1)) {
        process<true>(v, block, next);
        block = next;
        v += 2;
      }
      process<false>(v, block, block);
    }
    this->store();
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    forward_turns_kernel(const __grid_constant__ sm80::fp32::ForwardKernelParams params) {
  using Order = typename Config::Order;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ sm80::fp32::ForwardPlace shared_tile;
  __shared__ SlotBarriers barriers;
  {
    sm80::fp32::ForwardPlace tile;
    if (!sm80::find_tile<Config::kBlockM, Config::kBlockN>(params, tile)) return;
    if (params.flags[int64_t{tile.batch} * params.problem.num_heads_k + tile.kv_head] != 0) return;
    tile.find_sources(params);
    if (threadIdx.x == 0) {
      shared_tile = tile;
      Order::init(barriers);
    }
  }
  __syncthreads();  // the tile and the barriers are there
  const int warpgroup = int(uniform(threadIdx.x / 128));
  const uint32_t begin = (shared_address(shared) + 1023) & ~1023u;
  if (warpgroup == Order::kConsumers) {
    register_budget_lower<Order::kProducerRegisters>();
    produce<Config>(params, shared_tile, begin + Config::kQueryBytes, barriers);
  } else {
    register_budget_raise<Order::kConsumerRegisters>();
    TurnsBlock<Config>(params, shared_tile, begin, barriers, warpgroup).run();
  }
}

}  // namespace flash_attn::cuda::sm90::fp32
