// The gradient of attn_mask by the tiles themselves, where rows and columns are not broadcast: dS leaves from the
// consumers' registers. If the mask is broadcast over batch or heads, the tiles of one key block and query block add up
// one after the other, in the order of batch and heads, so that the sum is the same every time: the first stores, each
// of the others waits until those before it have added. That is also the order of tiles (schedule/order.h): a tile
// waits for tiles before its own.
//
// All scores that share a block of the mask visit it, or none: such problems are dense, and see the same of the mask.
#pragma once

#include "steps.h"

namespace flash_attn::cuda::sm90::backward::extended {

/// How many scores come before that of this batch entry and query head in a number's sum.
FLASH_ATTN_DEVICE int dmask_turns_before(const ForwardParams& p, int batch, int head) {
  const MaskView& mask = p.mask;
  const int heads_before = mask.head_size == 1 ? head : 0;
  const int heads = mask.head_size == 1 ? static_cast<int>(p.num_heads) : 1;
  return (mask.batch_size == 1 ? batch * heads : 0) + heads_before;
}

/// Of batch entry and query head: of attn_mask's batch entries and heads.
FLASH_ATTN_DEVICE int64_t mask_slice(const MaskView& mask, int batch, int head) {
  return (mask.batch_size == 1 ? 0 : batch * mask.head_size) + (mask.head_size == 1 ? 0 : head);
}

/// The tile at this place in their order. Where tiles add up attn_mask's gradient one after the other, those that share
/// its blocks follow each other, so that they run side by side and L2 holds the blocks until all have added.
FLASH_ATTN_DEVICE int tile_in_order(const KernelParams& params, int place) {
  const Schedule& schedule = params.schedule;
  if (params.extended.dmask_counters == nullptr || place >= schedule.num_tiles) return place;
  const MaskView& mask = params.problem.mask;
  const int heads = params.split.heads.value, batch = schedule.num_batch_heads / heads;
  const bool heads_share = mask.head_size == 1, batch_shares = mask.batch_size == 1;
  const bool head_by_head = schedule.heads_per_group == 1 && schedule.grouped_heads == schedule.num_batch_heads;
  if (!head_by_head || schedule.falling || (heads_share && params.split.heads_of_tile > 1)) return place;
  const int sharers = (heads_share ? heads : 1) * (batch_shares ? batch : 1);
  const int block = place / sharers, sharer = place - block * sharers;  // of the mask's slices, one after the other
  const int slice = block / schedule.num_n_blocks;
  const int batch_head = !heads_share ? sharer * heads + slice : slice * heads + sharer;
  return block + (batch_head - slice) * schedule.num_n_blocks;
}

/// By one thread: when it is the turn of a step, and others what consumers have added. Steps have DqTurns, as with dQ
/// from registers; of two CTAs that share a tile each has its own.
template <typename Config>
FLASH_ATTN_DEVICE void follow_dmask_step(const KernelParams& params, DqTurns& turns, const Tile& tile, const Step& step,
                                         uint32_t number, int rank = 0) {
  const int batch = params.split.heads.divide(tile.batch_head), head = tile.q_head + step.head;
  const int64_t n_block =
      mask_slice(params.problem.mask, batch, head) * params.schedule.num_n_blocks + tile.n_begin / Config::kBlockN;
  int* const count =
      params.extended.dmask_counters + (n_block * Config::kCtas + rank) * params.num_m_blocks + step.m_block;
  const int before = dmask_turns_before(params.problem, batch, head);
  wait_for_count(count, before);
  say_turn(turns, number, before == 0);
  mbarrier_wait(&turns.added[number % 2], number / 2 % 2);
  mbarrier_arrive(&turns.released[number % 2]);
  add_to_count(count);
}

/// The same of all steps of all tiles.
template <typename Config>
FLASH_ATTN_DEVICE void follow_dmask(const KernelParams& params, SharedStorage<Config>& shared) {
  follow_steps<Config>(shared, [&](const Tile& tile, const Step& step, uint32_t number) {
    follow_dmask_step<Config>(params, shared.dmask_turns, tile, step, number);
  });
}

// By a thread of a consumer:

/// Waits for the step's turn; whether its numbers are stored, or else added.
FLASH_ATTN_DEVICE bool begin_dmask(const KernelParams& params, DqTurns& turns, uint32_t step) {
  if (params.extended.dmask_counters == nullptr) return true;
  mbarrier_wait(&turns.begun[step % 2], step / 2 % 2);
  return turns.first[step % 2] != 0;
}
FLASH_ATTN_DEVICE void end_dmask(const KernelParams& params, DqTurns& turns, uint32_t step) {
  if (params.extended.dmask_counters != nullptr) mbarrier_arrive(&turns.added[step % 2]);
}

/// Stores or adds. By a predicate, as global_store_or_add().
FLASH_ATTN_DEVICE void store_or_add(bool store, float* global, float x) {
  asm volatile(
      "{\n"
      ".reg .pred store;\n"
      "setp.ne.s32 store, %2, 0;\n"
      "@store st.relaxed.gpu.global.f32 [%0], %1;\n"
      "@!store red.relaxed.gpu.global.add.f32 [%0], %1;\n"
      "}" ::"l"(global),
      "f"(x), "r"(static_cast<int>(store))
      : "memory");
}

}  // namespace flash_attn::cuda::sm90::backward::extended
