// The order in which tiles bring their dQ of a query block to dq_accum: with DqProtocol::kOrdered a fixed one, so that
// the sum is the same every time, else as they come. Either way the first stores and the others add, so dq_accum need
// not be zero before. (Where it is, at head dimension 64, dq_counters is null, and all tiles add without waiting.)
#pragma once

#include "../../../common/counters.h"
#include "../../hopper/barriers.h"
#include "../schedule/walk.h"

namespace flash_attn::cuda::sm90::backward {

// ---- a fixed order

/// How many tiles add to dq of query rows [row_begin, row_end) before this one: by n_begin, in the order of columns
/// that Schedule gives its group.
/// Where columns rise in causal attention, in the last group, a tile begins with the last block (m_step is -1): it is
/// then one turn behind its neighbour. From the first on it would wait until that one has come to the block where its
/// own keys are seen.
template <typename Config>
FLASH_ATTN_DEVICE int tiles_before(const KernelParams& params, const Tile& tile, int row_begin, int row_end) {
  constexpr int kBlockN = Config::kBlockN;
  const int n_block = tile.n_begin / kBlockN;
  if (!params.schedule.falling || block_step<Config>(tile) < 0) {
    return tile.band().tiles_left_of<kBlockN>(n_block, row_begin);
  }
  return tile.band().tiles_right_of<kBlockN>(n_block, row_end);
}

// ---- as they come

/// A block's state: 0; then 4 times the number from 1 on of the tile that has claimed it, plus 1 for each of this
/// tile's CTAs that has stored its dQ.
template <int kCtas>
FLASH_ATTN_DEVICE bool is_stored(int state) {
  return state % 4 == kCtas;
}

/// Whether this tile is the first; if not, waits until the first has stored its dQ. One CTA of a tile claims for all of
/// them (`claims`), in the order of the tile's steps.
template <int kCtas = 1>
FLASH_ATTN_DEVICE bool claim_block(int* state, int tile, bool claims = true) {
  const int claimed = 4 * (tile + 1);
  int found;
  if (claims) {
    asm volatile("atom.acquire.gpu.global.cas.b32 %0, [%1], 0, %2;"
                 : "=r"(found)
                 : "l"(state), "r"(claimed)
                 : "memory");
    if (found == 0) return true;
  } else {
    do {
      found = load_acquire(state);
    } while (found == 0);
    if (found / 4 == claimed / 4) return true;
  }
  while (!is_stored<kCtas>(found)) found = load_acquire(state);
  return false;
}

// ---- dQ from the registers of consumers

/// Between consumers and the threads that see to their turns, so that they need not wait for messages to L2 and back.
/// Of a step, and of the next.
struct DqTurns {
  uint64_t begun[2];     // the turn of the step's block has come
  uint64_t added[2];     // all threads of consumers have stored or added
  uint64_t released[2];  // `first` has been read for the last time
  int first[2];          // the consumers store
};

FLASH_ATTN_DEVICE void init_turns(DqTurns& turns, int consumer_threads) {
  for (int i = 0; i < 2; ++i) {
    mbarrier_init(&turns.begun[i], 1);
    mbarrier_init(&turns.added[i], consumer_threads);
    mbarrier_init(&turns.released[i], 1);
  }
}

/// The counter at which the next turn is called: of a CTA of this rank in its cluster.
FLASH_ATTN_DEVICE int* turn_count(const KernelParams& params, BlockCounters& block, int rank) {
  return params.is_ordered() ? &block.added[rank] : &block.claim;
}

/// By a thread: the step's turn has come; `first`: consumers store.
FLASH_ATTN_DEVICE void say_turn(DqTurns& turns, uint32_t step, bool first) {
  mbarrier_wait(&turns.released[step % 2], step / 2 % 2 ^ 1);
  turns.first[step % 2] = first;
  mbarrier_arrive(&turns.begun[step % 2]);
}

/// By a thread: waits for the turn of a step, `step` counted over all tiles; `block`: counters of the step's.
template <typename Config>
FLASH_ATTN_DEVICE void begin_turn(const KernelParams& params, const Tile& tile, int m_block, BlockCounters& block,
                                  DqTurns& turns, uint32_t step, int rank = 0) {
  constexpr int kBlockM = Config::kBlockM;
  int* const count = turn_count(params, block, rank);
  bool first;
  if (params.is_ordered()) {
    const int before = tiles_before<Config>(params, tile, m_block * kBlockM, (m_block + 1) * kBlockM);
    wait_for_count(count, before);
    first = before == 0;
  } else {
    first = claim_block<Config::kCtas>(count, tile.index, rank == 0);
  }
  say_turn(turns, step, first);
}

/// By the same thread or another.
FLASH_ATTN_DEVICE void end_turn(const KernelParams& params, BlockCounters& block, DqTurns& turns, uint32_t step,
                                int rank = 0) {
  mbarrier_wait(&turns.added[step % 2], step / 2 % 2);
  const bool first = turns.first[step % 2];
  mbarrier_arrive(&turns.released[step % 2]);
  if (params.is_ordered() || first) add_to_count(turn_count(params, block, rank));  // the next turn has come; or stored
}

/// Which of the two a thread does at each step of a tile.
enum class TurnPart { kBegin, kEnd, kBoth };

/// By a thread: all steps of a tile; `step` counts them over all tiles.
template <TurnPart kPart, typename Config>
FLASH_ATTN_DEVICE void follow_turns(const KernelParams& params, const Tile& tile, DqTurns& turns, uint32_t& step,
                                    int rank = 0) {
  for_each_block<Config>(tile, [&](const BlockWalk<Config>& walk) {
    BlockCounters& block = params.dq_counters[walk.index(params)];
    if constexpr (kPart != TurnPart::kEnd) begin_turn<Config>(params, tile, walk.m_block, block, turns, step, rank);
    if constexpr (kPart != TurnPart::kBegin) end_turn(params, block, turns, step, rank);
    ++step;
  });
}

// By a thread of a consumer:

/// Stores or adds. By a predicate: a branch there slows the loop of products (benchmarks/experiments/044).
FLASH_ATTN_DEVICE void global_store_or_add(bool store, float* global, const float* x) {
  asm volatile(
      "{\n"
      ".reg .pred store;\n"
      "setp.ne.s32 store, %5, 0;\n"
      "@store st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};\n"
      "@!store red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n"
      "}" ::"l"(global),
      "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(static_cast<int>(store))
      : "memory");
}

/// Waits for the turn; whether it is the first of the step's block.
FLASH_ATTN_DEVICE bool await_turn(const KernelParams& params, DqTurns& turns, uint32_t step) {
  if (!params.has_turns()) return false;
  mbarrier_wait(&turns.begun[step % 2], step / 2 % 2);
  return turns.first[step % 2];
}

/// Its part of dQ of the step goes to float4s 128 floats apart.
template <int kSize>
FLASH_ATTN_DEVICE void take_turn(const KernelParams& params, DqTurns& turns, uint32_t step, bool first, float* to,
                                 const float (&dq)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) global_store_or_add(first, to + i / 4 * 128, dq + i);
  if (params.has_turns()) mbarrier_arrive(&turns.added[step % 2]);
}

}  // namespace flash_attn::cuda::sm90::backward
