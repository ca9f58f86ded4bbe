// Forward for float32 where a block has an SM to itself: as sm80/fp32/forward, with the next tile's S on its way while
// P is computed from this one's, and one barrier a tile:
//
//   wait for V and the next K     begin the next S     P = exp(S - max), rescale O     O += P V, behind the next S
//
// Tiles lie in a ring of four slots, in the order of their loads: K, V of the first tile, K, V of the second, ... At
// the barrier all warps are done with this tile's K and the last one's V, whose slots the next V and the K after it
// get.
#pragma once

#include "../../sm80/fp32/forward/kernel.h"
#include "products.h"

namespace flash_attn::cuda::sm90::fp32 {

template <typename Config>
struct PipelinedBlock : sm80::fp32::ForwardBlock<Config> {
  using Base = sm80::fp32::ForwardBlock<Config>;
  using Base::Base, Base::tile, Base::p, Base::s, Base::o, Base::softmax, Base::kNTiles, Base::kBlockM, Base::kBlockN,
      Base::warp;
  static constexpr int kSlots = 4, kLeastSlots = kSlots, kPanels = Config::kHeadDim / 64;
  static constexpr bool kReduced = Config::Products::kReduced;

  SM80_DEVICE uint32_t slot(int number) const {
    return this->slots_begin() + uint32_t(number) % kSlots * Config::kSlotBytes;
  }

  /// As sm80::fp32::ForwardBlock::process(). K of the tile was number `first` of the loads.
  template <bool kNext>
  SM80_DEVICE void process(int first, int block, int next) {
    sm80::cp_async_wait<0>();
    Config::Products::release_copies();
    __syncthreads();  // V and the next K are there, and their predecessors are done with
    FlatScores<kNTiles> next_s, later;
    if constexpr (kNext) {
      this->load_next(slot(first + 3), false);
      this->load_next(slot(first + 4), true);
      wgmma_fence();
      start_rows<kReduced, Config::kHeadDim, kBlockM, kBlockN, kNTiles>(
          next_s, later, this->q_tile() + warp() / 4 * 64 * 128, slot(first + 2));
    }
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
    {
      float sum[32];
      wgmma_fence();
      start_panel<kReduced, Config::kHeadDim>(sum, pairs, slot(first + 1), 0);
      if constexpr (kNext) {
        wgmma_wait<1>();
        wgmma_results(next_s);
        wgmma_results(later);
#pragma unroll
        for (int i = 0; i < 4 * kNTiles; ++i) flat(s)[i] = next_s[i] + later[i];
      }
      wgmma_wait<0>();
      finish_panel(o, sum, 0, unit);
    }
#pragma unroll
    for (int panel = 1; panel < kPanels; ++panel) {
      float sum[32];
      wgmma_fence();
      start_panel<kReduced, Config::kHeadDim>(sum, pairs, slot(first + 1), panel);
      wgmma_wait<0>();
      finish_panel(o, sum, panel, unit);
    }
  }

  SM80_DEVICE void run() {
    this->load_q();  // arrives with the first tile
    int block = this->load_block;
    if (block >= tile.block_begin) {
      this->load_units(block);
      for (int i = 0; i < 3; ++i) this->load_next(slot(i), i % 2 == 0);
      sm80::cp_async_wait<2>();
      Config::Products::release_copies();
      __syncthreads();  // Q and the first K are there
      Config::Products::template multiply_rows<Config::kHeadDim, Config::kSumSteps, kBlockM, kBlockN>(s, this->q_tile(),
                                                                                                      slot(0), *this);
      int first = 0;
      for (int next = this->visited_block(block - 1); next >= tile.block_begin; next = this->visited_block(block - 1)) {
        process<true>(first, block, next);
        block = next;
        first += 2;
      }
      process<false>(first, block, block);
    }
    sm80::cp_async_wait<0>();
    this->store();
  }
};

}  // namespace flash_attn::cuda::sm90::fp32
