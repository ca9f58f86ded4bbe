// One thread of kernel.h's third warpgroup sees to the rows that the tile prepares.
#pragma once

#include "../../hopper/tma.h"
#include "config.h"

namespace flash_attn::cuda::sm90::backward::pair {

/// The CTAs of a pair share out the blocks that their tile prepares. Of this CTA's: process(index in the share, phase
/// of barriers that complete once a block).
template <typename Process>
FLASH_ATTN_DEVICE void for_own_prepared(const Tile& tile, int rank, Process process) {
  uint32_t phase = 0;
#pragma unroll 1
  for (int i = rank; i < tile.prepared_blocks; i += 2, phase ^= 1) process(i, phase);
}

/// One thread sees to the rows that the tile prepares: chooses them when the kernel has begun, copies out and dO of a
/// block, and counts it when consumers are through with it.
template <typename Config>
struct Preparer {
  const KernelParams& params;
  SharedStorage<Config>& shared;
  const int rank;

  /// To buffers that the first step does not use at its start.
  FLASH_ATTN_DEVICE void load_block(int i) {
    const QueryShare& share = shared.prepared_share;
    const BlockOfShare at = block_of_share(share, i);
    const int x = share.q_x + at.m_block * Config::kBlockM, head = share.q_head + at.head;
    uint64_t* const full = &shared.prepared_full;
    mbarrier_arrive_expect(full, 2 * params.panels_v * Config::kPanelBytes);
    for (int panel = 0; panel < params.panels_v; ++panel) {
      tma_load(shared.q[1] + panel * Config::kPanelBytes, &params.preparation.out, full,
               {64 * panel, x, share.q_y, head, share.q_batch});
      tma_load(prepared_dout(shared, panel), &params.dout, full, {64 * panel, x, share.q_y, head, share.q_batch});
    }
  }

  FLASH_ATTN_DEVICE void load_or_end(int i, int blocks) {
    if (i < blocks) {
      load_block(i);
    } else {
      mbarrier_arrive(&shared.all_prepared);
    }
  }

  FLASH_ATTN_DEVICE void count_block(int i) {
    const QueryShare& share = shared.prepared_share;
    add_to_count(prepared_count(params, share.batch_head, block_of_share(share, i).head));
  }

  FLASH_ATTN_DEVICE void run() {
    if (!params.preparation.enabled()) {
      mbarrier_arrive(&shared.all_prepared);
      return;
    }
    const int blocks = choose_prepared<Config>(params, blockIdx.x / 2, shared.prepared_share);
    shared.tile.prepared_blocks = blocks;
    mbarrier_arrive(&shared.share_chosen);
    load_or_end(rank, blocks);
    for_own_prepared(shared.tile, rank, [&](int i, uint32_t phase) {
      mbarrier_wait(&shared.prepared_empty, phase);
      load_or_end(i + 2, blocks);
      count_block(i);  // takes a while
    });
  }
};

}  // namespace flash_attn::cuda::sm90::backward::pair
