// The producer of extended/kernel.h: as single/producer.h, of the steps that a tile visits, and attn_mask's values.
#pragma once

#include "../single/producer.h"
#include "steps.h"

namespace flash_attn::cuda::sm90::backward::extended {

template <typename Config>
struct Producer : single::Producer<Config> {
  using Base = single::Producer<Config>;
  using Base::params, Base::q, Base::tiles;

  SharedStorage<Config>& extended;
  StepReader steps;
  uint32_t number = 0;  // of steps so far

  FLASH_ATTN_DEVICE void load_q(const Tile& tile, const Step& step) {
    uint64_t* const full = &extended.q_full[q.stage];
    mbarrier_wait(&extended.q_empty[q.stage], q.phase ^ 1);
    const bool hidden = (step.rules & kHidden) != 0;
    mbarrier_arrive_expect(
        full, params.panels * Config::kPanelBytesQ + Config::kBytesStatistics + (hidden ? Config::kBytesBits : 0));
    if (hidden) {
      bulk_load(extended.bits[q.stage], params.extended.classes.bits + int64_t{step.block} * (Config::kBytesBits / 4),
                Config::kBytesBits, full);
    }
    Base::template load<Config::kPanelBytesQ>(params.q, params.panels, extended.q[q.stage], full,
                                              tile.q_x + step.m_block * Config::kBlockM, tile.q_y,
                                              tile.q_head + step.head, tile.q_batch);
    const char* const statistics = reinterpret_cast<const char*>(params.statistics);
    bulk_load(extended.statistics[q.stage],
              statistics + int64_t{block_of_step(params, tile, step)} * Config::kBytesStatistics,
              Config::kBytesStatistics, full);
  }

  FLASH_ATTN_DEVICE void load_dout(const Tile& tile, const Step& step) {
    uint64_t* const full = &extended.dout_full[q.stage];
    mbarrier_wait(&extended.dout_empty[q.stage], q.phase ^ 1);
    mbarrier_arrive_expect(full, params.panels_v * Config::kPanelBytesQ);
    Base::template load<Config::kPanelBytesQ>(params.dout, params.panels_v, extended.dout[q.stage], full,
                                              tile.q_x + step.m_block * Config::kBlockM, tile.q_y,
                                              tile.q_head + step.head, tile.q_batch);
  }

  FLASH_ATTN_DEVICE void load_bias(const Tile& tile, const Step& step) {
    const MaskView& mask = params.problem.mask;
    const int head = mask.head_size > 1 ? tile.q_head + step.head : 0;
    const int batch = mask.batch_size > 1 ? params.split.heads.divide(tile.batch_head) : 0;
    const bool biased = (step.rules & kBiased) != 0;
    mbarrier_wait(&extended.bias_empty, number % 2 ^ 1);
    mbarrier_arrive_expect(&extended.bias_full, biased ? Config::kBytesBias : 0);
    for (int i = 0; i < Config::kConsumers && biased; ++i) {
      tma_load(extended.bias + i * Config::kPanelBytesQ, &params.extended.bias, &extended.bias_full,
               {tile.n_begin + 64 * i, step.m_block * Config::kBlockM, head, batch, 0});
    }
  }

  /// K and V with the first step; a tile without a step has none.
  FLASH_ATTN_DEVICE void load_tile(const Tile& tile) {
    bool begun = false;
    const auto load_rows = [&](const CUtensorMap& map, int panels, uint8_t* buffer, uint64_t* full, bool some) {
      mbarrier_arrive_expect(full, some ? panels * Config::kPanelBytesKV : 0);
      Base::template load<Config::kPanelBytesKV>(map, some ? panels : 0, buffer, full, tile.kv_x, tile.kv_y,
                                                 tile.kv_head, tile.kv_batch);
    };
    const auto load_keys = [&](bool some) {
      const int stage = tiles.stage_kv();
      mbarrier_wait(&extended.kv_empty[stage], tiles.phase_kv() ^ 1);
      load_rows(params.k, params.panels, extended.k[stage], &extended.k_full[stage], some);
      load_rows(params.v, params.panels_v, extended.v[stage], &extended.v_full[stage], some);
    };
    steps.for_each<false>(extended, [&](const Step& step) {
      if (!begun) load_keys(true);
      begun = true;
      load_q(tile, step);
      if (Config::kTakesBias && params.extended.bias_by_tma) load_bias(tile, step);
      load_dout(tile, step);
      q.advance();
      ++number;
    });
    if (!begun) load_keys(false);
  }

  FLASH_ATTN_DEVICE void run() {
    global_proxy_fence();  // what another launch has prepared
    while (true) {
      mbarrier_wait(&extended.tile_full[tiles.slot()], tiles.slot_phase());
      const Tile& tile = extended.tiles[tiles.slot()];
      if (tile.num_heads < 0) break;
      load_tile(tile);
      mbarrier_arrive(&extended.tile_wanted);
      mbarrier_arrive(&extended.tile_empty[tiles.slot()]);
      ++tiles.count;
    }
  }
};

}  // namespace flash_attn::cuda::sm90::backward::extended
