// The producer of extended_pair/kernel.h: as pair/producer.h, of the steps that a tile visits, and attn_mask's values.
#pragma once

#include "../extended/steps.h"
#include "../pair/producer.h"
#include "config.h"

namespace flash_attn::cuda::sm90::backward::extended_pair {

template <typename Config>
struct Producer : pair::Producer<Config> {
  using Base = pair::Producer<Config>;
  using Base::params, Base::shared, Base::rank;

  FLASH_ATTN_DEVICE void load_bias(int step, const extended::Step& at) {
    const MaskView& mask = params.problem.mask;
    const Tile& tile = shared.tile;
    const int head = mask.head_size > 1 ? tile.q_head + at.head : 0;
    const int batch = mask.batch_size > 1 ? params.split.heads.divide(tile.batch_head) : 0;
    const bool biased = (at.rules & extended::kBiased) != 0;
    mbarrier_wait(&shared.bias_empty, step % 2 ^ 1);
    mbarrier_arrive_expect(&shared.bias_full, biased ? Config::kPanelBytes : 0);
    if (!biased) return;
    tma_load(shared.bias, &params.extended.bias, &shared.bias_full,
             {tile.n_begin + Config::kRowsN * rank, at.m_block * Config::kBlockM, head, batch, 0});
  }

  /// K and V before it is known whether attn_mask lets the tile visit a block, which takes a while.
  FLASH_ATTN_DEVICE void run() {
    Base::load_k();
    Base::load_v();
    global_proxy_fence();  // what another launch has prepared
    extended::StepCursor<pair::SharedStorage<Config>> steps{shared};
    if (!steps.begin()) return;
    uint32_t step = 0;
#pragma unroll 1
    do {
      const extended::Step& at = steps.at();
      Base::load_q(step, at.head, at.m_block);
      forget_derived(step);
      Base::load_statistics(step, extended::block_of_step(params, shared.tile, at));
      if (params.extended.bias_by_tma) load_bias(step, at);
      Base::load_dout(step, at.head, at.m_block);
      ++step;
    } while (steps.advance());
  }
};

}  // namespace flash_attn::cuda::sm90::backward::extended_pair
