// A block of a backward kernel for float32: what it loads, and the loop over tiles of the other rows. See kernel.h.
#pragma once

#include "scores.h"

namespace flash_attn::cuda::sm80::fp32 {

template <typename Config>
struct BackwardBlock : BackwardScores<Config> {
  using Base = BackwardScores<Config>;
  using Base::kMTiles, Base::kNTiles, Base::kStages, Base::kBlockM, Base::kBlockN, Base::kOfKeys, Base::kWithDx,
      Base::kWithDy, Base::kExtended, Base::params, Base::tile, Base::p, Base::shared, Base::head, Base::block,
      Base::step, Base::x_unit, Base::y_unit, Base::scale, Base::lane, Base::stage, Base::advance;
  using typename Base::Scores;

  OtherHeads& others;
  int next_head, next_block;  // that are loaded next

  SM80_DEVICE BackwardBlock(const BackwardKernelParams& kernel_params, const BackwardTile& t, OtherHeads& other_heads,
                            uint32_t shared_memory)
      : Base(kernel_params, t, shared_memory), others(other_heads), next_head(t.head_begin), next_block(t.block_begin) {
    if constexpr (kExtended) {  // the first tile of which attn_mask shows something
      --block, --next_block;
      advance(head, block);
      advance_loads();
    }
    if constexpr (!kOfKeys) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int at = min(this->own_row(m, r), tile.own_rows - 1);
          this->lse[m][r] = others[tile.head_begin].lse[tile.own_begin + at];
          this->delta[m][r] = others[tile.head_begin].delta[tile.own_begin + at];
        }
      }
    }
  }

  // -- loading

  SM80_DEVICE void load_own(uint32_t to, const PlaneRows& rows) const {
    constexpr int kColumns = 2 * Config::kHeadDim;
    const int end = tile.own_rows;
    load_rows<typename Config::OwnTile, kBlockM, Config::kLoaded, Config::kThreads>(
        to, rows.data + int64_t{tile.own_begin} * kColumns, threadIdx.x, end >= kBlockM,
        [end](int row) { return row < end; });
  }

  SM80_DEVICE void load_other(uint32_t to, bool of_y) const {
    constexpr int kColumns = 2 * Config::kHeadDim;
    const __half* const rows = of_y ? others[next_head].y.data : others[next_head].x.data;
    const int first = next_block * kBlockN, begin = tile.other_begin - first, end = tile.other_end - first;
    load_rows<typename Config::OtherTile, kBlockN, Config::kLoaded, Config::kThreads>(
        to, rows + int64_t{first} * kColumns, fresh_thread(step), begin <= 0 && end >= kBlockN,
        [=](int row) { return row >= begin && row < end; });
  }

  /// The next tile, if there is one; in any case a group of copies, so that groups can be counted.
  SM80_DEVICE void load_next(int number) {
    if (next_head < tile.head_end) {
      const uint32_t to = stage(number);
      load_other(to, false);
      load_other(to + Config::kTileBytes, true);
      if constexpr (kOfKeys) load_statistics(to + Config::kStatistics);
      advance_loads();
    }
    cp_async_commit();
  }

  /// lse, then delta, of the query rows of a tile; of those that do not exist 0.
  SM80_DEVICE void load_statistics(uint32_t to) const {
    const int i = int(threadIdx.x);
    if (i >= 2 * kBlockN) return;
    const int row = next_block * kBlockN + i % kBlockN;
    const float* const from = i < kBlockN ? others[next_head].lse : others[next_head].delta;
    load_statistic(to + 4 * i, from, row, tile.others);
  }

  /// A new head is there behind the next barrier.
  SM80_DEVICE void advance_loads() {
    const int before = next_head;
    advance(next_head, next_block);
    if (kOfKeys && next_head != before && next_head < tile.head_end && threadIdx.x == 0) {
      others[next_head] = find_other_head<kOfKeys>(params, tile, next_head);
    }
  }

  // -- the loop over tiles

  SM80_DEVICE void process() {
    const int at = lane();
    const uint32_t x = stage(step), y = x + Config::kTileBytes, statistics = x + Config::kStatistics;
    const int unit_at = block * kBlockN / kTileRows;
    const float other_x_unit = __ldg(others[head].x.units + unit_at);
    const float other_y_unit = __ldg(others[head].y.units + unit_at);
    Scores s, dp;
    this->multiply(s, Config::kX, x);
    if constexpr (kExtended) {
      if constexpr (kWithDx) {
        this->multiply(dp, Config::kY, y);
      } else {
        clear(dp);
      }
      this->take_extended(s, dp, x_unit * other_x_unit, y_unit * other_y_unit, statistics, at);
    } else {
      this->take_exponentials(s, x_unit * other_x_unit * scale, statistics, at);
    }
    if constexpr (kWithDy) this->add_to_dy(s, y, other_y_unit);
    if constexpr (kWithDx) {
      if constexpr (!kExtended) {
        this->multiply(dp, Config::kY, y);
        this->find_gradients(dp, s, y_unit * other_y_unit, statistics, at);
      }
      this->add_to_dx(dp, x, other_x_unit);
    }
  }

  /// Loads tile after tile and calls `work` for each.
  template <typename Work>
  SM80_DEVICE void walk(const Work& work) {
    if constexpr (kExtended && kOfKeys) __syncthreads();  // the first head is there
    if (tile.block_begin < tile.block_end) {
      load_own(shared + Config::kX, tile.x);
      if constexpr (kWithDx) load_own(shared + Config::kY, tile.y);
      for (int i = 0; i < kStages - 1; ++i) load_next(i);
#pragma unroll 1
      while (head < tile.head_end) {
        if constexpr (kStages == 1) {
          if (step > 0) __syncthreads();  // all warps are done with the tile before
          load_next(step);
          cp_async_wait<0>();
        } else {
          cp_async_wait<kStages - 2>();
        }
        Config::Products::release_copies();
        __syncthreads();  // this tile is there for all warps, who all are done with the one before
        if constexpr (kStages > 1) load_next(step + kStages - 1);
        work();
        advance(head, block);
        ++step;
      }
    }
    cp_async_wait<0>();
  }

  SM80_DEVICE void run() {
    walk([this] { process(); });
    this->store_gradients();
  }
};

}  // namespace flash_attn::cuda::sm80::fp32
