// Two warpgroups on the same 64 rows, each with half of O's columns. They take turns with the blocks of keys: the one
// whose turn it is computes scores and probabilities, and both multiply its probabilities with their columns of the
// block. While one waits for the softmax of a block, the other's products keep the tensor cores busy.
//
//   warpgroup 0:  S0  softmax  P0 V0    S2  P1 V1  softmax  P2 V2    S4 ...
//   warpgroup 1:  S1         P0 V0  softmax  P1 V1    S3  P2 V2  softmax ...
//
// A row's maximum goes from block to block with the probabilities, so that all of a block are relative to one. Threads
// of the same place in both have the same rows and keys: what one writes for the other is its own fragment.
#pragma once

#include "../../sm90/hopper/wgmma_narrow.h"
#include "../ends/finish.h"
#include "../ends/lane_rows.h"
#include "../kernel.h"
#include "../warpgroups/operands.h"
#include "config.h"

namespace flash_attn::cuda::decode {

template <typename C>
class LatentPair {
 public:
  using Config = C;

  /// By one thread, before a barrier of the CTA.
  FLASH_ATTN_DEVICE static void prepare(const Memory<C>& memory) {
    for (uint64_t& written : reinterpret_cast<Messages*>(memory.statistics)->written) barrier_init(&written, 128);
  }

  /// What both warpgroups do with the share's blocks.
  FLASH_ATTN_DEVICE static int use_stages(const DecodeParams& params, const Memory<C>& memory, const Unit& first) {
    return LatentPair(params, memory).use(first);
  }

 private:
  using ScoreProducts = sm90::WgmmaNarrow<typename C::Element>;
  using Products = sm90::Wgmma<typename C::Element>;
  static constexpr int kSteps = C::kHeadDim / 16, kKeySteps = C::kBlockN / 16;
  static constexpr int kColumns = C::kHeadDimV / 2, kTiles = kColumns / 8;

  /// A block's probabilities and what they are relative to, of all threads of a warpgroup.
  struct Message {
    uint4 probabilities[kKeySteps][128];
    float2 row_max[128];
  };
  struct Messages {
    Message of[2];        // of each warpgroup
    uint64_t written[2];  // barriers: it is there
  };
  static_assert(sizeof(Messages) <= C::kStatisticsBytes);

  FLASH_ATTN_DEVICE LatentPair(const DecodeParams& params, const Memory<C>& memory)
      : params_(params),
        memory_(memory),
        group_(int(threadIdx.x) / 128),
        thread_(threadIdx.x % 128),
        messages_(reinterpret_cast<Messages*>(memory.statistics)) {}

  FLASH_ATTN_DEVICE int use(const Unit& first) {
    StagePlace at;
    TileInfo begun = tile_info<C>(params_, first);
    if (params_.early) grid_dependency_wait();
    if (threadIdx.x == 0) open_arrivals(params_);
#pragma unroll 1
    for (;;) {
      start(begun);
      consumers_sync<C>();  // the queries are there
      Turn turn;
      if (group_ == 1) pass_over(at, turn);
#pragma unroll 1
      while (!turn.ends) {
        own_block(at, turn);
        if (!turn.ends) {
          release(turn.stage);
          pass_over(at, turn);
        }
      }
      add_others(turn);
      wait_for_products();
      const FreeStages free = turn.last ? FreeStages{memory_.stages, params_.stages} : FreeStages{stage(turn.stage), 1};
      finish(memory_.board.tiles[turn.slot], memory_.scratch->share, free);
      if (turn.last) return turn.slot;
      release(turn.stage);
      barrier_wait(memory_.barriers->full + at.stage, at.parity);
      begun = memory_.board.tiles[memory_.board.blocks[at.stage].slot];
    }
  }

  FLASH_ATTN_DEVICE void release(int number) const { barrier_arrive(memory_.barriers->empty + number); }

  FLASH_ATTN_DEVICE unsigned char* stage(int number) const { return memory_.stages + number * C::kStageBytes; }

  /// At the start of a tile: nothing summed up yet, and the rows' queries, half of the columns by each warpgroup.
  FLASH_ATTN_DEVICE void start(const TileInfo& t) {
    const LaneQueries<C> from(params_, t, first_row_of_lane(), rows_);
    constexpr int kChunks = C::kHeadDim / 16;  // of 8 columns, a warpgroup
    copy_queries<C>(params_, t, memory_.queries, group_ * kChunks, (group_ + 1) * kChunks);
    softmax_.reset();
    clear(o_);
  }

  /// The last block that this warpgroup has come to.
  struct Turn {
    int stage = 0, slot = 0;
    bool ends = false;     // the tile
    bool last = false;     // of the share
    bool waiting = false;  // it is the other's, whose probabilities are not multiplied with values yet
  };

  /// A block that is the other's: when it is there, on to the next.
  FLASH_ATTN_DEVICE void pass_over(StagePlace& at, Turn& turn) const {
    barrier_wait(memory_.barriers->full + at.stage, at.parity);
    const BlockInfo block = memory_.board.blocks[at.stage];
    if (block.ends) fence_for_products();  // the loading warps' copies; else own_block() does it for both
    turn = {at.stage, block.slot, block.ends, block.last, true};
    at.advance(params_.stages);
  }

  /// Scores and probabilities of a block, under the scores' products the other's of the block before, and O += P V.
  FLASH_ATTN_DEVICE void own_block(StagePlace& at, Turn& turn) {
    const int number = at.stage;
    barrier_wait(memory_.barriers->full + number, at.parity);
    const BlockInfo block = memory_.board.blocks[number];
    at.advance(params_.stages);
    fence_for_products();  // the loading warps' copies
    float s[C::kBlockN / 8][4];
    const uint32_t keys = sm90::cluster_descriptor(stage(number)), queries = sm90::cluster_descriptor(memory_.queries);
    sm90::wgmma_discard(accumulators(s));
    sm90::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const uint32_t a = queries + sm90::k_step_along(k, C::kBlockM), b = keys + sm90::k_step_along(k, C::kBlockN);
      if (k == 0) ScoreProducts::template ss<false>(accumulators(s), a, b);
      if (k != 0) ScoreProducts::template ss<true>(accumulators(s), a, b);
    }
    sm90::wgmma_commit();
    const bool waited = turn.waiting;
    const int before = turn.stage;
    if (!waited) turn.stage = number;  // whose values are there
    add_others(turn);
    sm90::wgmma_wait<1>();
    sm90::wgmma_results(accumulators(s));
    Softmax<C>::template score<false>(params_, memory_.board.tiles[block.slot], rows_,
                                      block.first_key + 2 * (threadIdx.x % 4), block.partial, s);
    float factor[2];
    const bool grown = softmax_.update(s, factor);
    uint32_t p[kKeySteps][4];
    pack_probabilities<typename C::Element>(s, p);
    Message& message = messages_->of[group_];
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) message.probabilities[k][thread_] = {p[k][0], p[k][1], p[k][2], p[k][3]};
    message.row_max[thread_] = {softmax_.row_max[0], softmax_.row_max[1]};
    barrier_arrive(messages_->written + group_);
    wait_for_products();
    if (waited) release(before);
    if (grown) rescale(o_, factor);
    multiply(number, p);
    wait_for_products();
    turn = {number, block.slot, block.ends, block.last, false};
  }

  /// O += P V of the block that waits, with the probabilities that the other has computed; or nothing: zeros times
  /// values that are there, so that products are never in a branch.
  FLASH_ATTN_DEVICE void add_others(const Turn& turn) {
    uint32_t p[kKeySteps][4] = {};
    if (turn.waiting) {
      barrier_wait(messages_->written + (group_ ^ 1), read_ & 1);
      ++read_;
      const Message& message = messages_->of[group_ ^ 1];
#pragma unroll
      for (int k = 0; k < kKeySteps; ++k) {
        const uint4 x = message.probabilities[k][thread_];
        p[k][0] = x.x, p[k][1] = x.y, p[k][2] = x.z, p[k][3] = x.w;
      }
      const float2 high = message.row_max[thread_];
      if (__any_sync(~0u, high.x > softmax_.row_max[0] || high.y > softmax_.row_max[1])) {
        float factor[2];
        softmax_.move(high, factor);
        wait_for_products();  // of scores: while some are in flight, the compiler lets no accumulators be changed
        rescale(o_, factor);
      }
    }
    multiply(turn.stage, p);
  }

  FLASH_ATTN_DEVICE void multiply(int number, const uint32_t (&p)[kKeySteps][4]) {
    using Tile = typename C::Tile;
    const uint32_t values = descriptor_across(stage(number) + group_ * (kColumns / 64) * Tile::kPanelBytes, C::kBlockN);
    sm90::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) {
      Products::template rs<true>(accumulators(o_), p[k], values + sm90::k_step_across(k));
    }
    sm90::wgmma_commit();
  }

  FLASH_ATTN_DEVICE void wait_for_products() {
    sm90::wgmma_wait<0>();
    sm90::wgmma_results(accumulators(o_));
  }

  /// The tile's end. What a warpgroup has read of the other's message is free for its own sums of the rows.
  FLASH_ATTN_DEVICE void finish(const TileInfo& t, const Share& share, const FreeStages& free) {
    messages_->of[group_ ^ 1].row_max[thread_] = {softmax_.row_sum[0], softmax_.row_sum[1]};
    consumers_sync<C>();  // the sums are there
    const float2 sum = messages_->of[group_].row_max[thread_];
    softmax_.row_sum[0] += sum.x, softmax_.row_sum[1] += sum.y;
    finish_tile<C>(params_, t, share, memory_.word, free, [&](const RowSums& part) {
      store_lane_rows<C>(params_, t, first_row_of_lane(), group_ * kColumns, o_, softmax_, part);
    });
  }

  const DecodeParams& params_;
  const Memory<C>& memory_;
  const int group_, thread_;
  Messages* const messages_;
  int read_ = 0;  // of the other's messages
  float o_[kTiles][4];
  Softmax<C> softmax_;
  LaneRows rows_;
};

}  // namespace flash_attn::cuda::decode
