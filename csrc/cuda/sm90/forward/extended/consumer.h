// A consumer warpgroup under attn_mask and with rules of scores; see ../consumer.h.
#pragma once

#include "../../../common/scores/dropout_bits.h"
#include "../../../mask/bad_values.h"
#include "../consumer.h"
#include "bias.h"
#include "visited.h"

namespace flash_attn::cuda::sm90::forward {

template <typename Config>
struct ExtendedConsumer : Consumer<Config> {
  using Base = Consumer<Config>;
  using typename Base::Element;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kTilesN = kBlockN / 8;
  using Base::blocks;
  using Base::k;
  using Base::lane;
  using Base::out;
  using Base::params;
  using Base::s;
  using Base::softmax;
  using Base::tiles;
  using Base::v;
  using Base::warp;
  using Base::warpgroup;
  using Fragments = float[1][kTilesN][4];

  // Of the block whose S is computed next; bits by 64 columns, a block ahead.
  MaskFragments<1, 8> mask_bits[kBlockN / 64];
  const uint32_t* first_bits;  // of the warp's rows, in the mask's first column of cells
  BiasValues<Element, kTilesN> bias;
  uint32_t num_biased = 0;  // blocks so far whose values came by the copy engine
  KeptFragments<1, kTilesN> kept;

  FLASH_ATTN_DEVICE ExtendedStorage<Config>& storage() { return static_cast<ExtendedStorage<Config>&>(this->shared); }
  FLASH_ATTN_DEVICE Fragments& fragments() { return reinterpret_cast<Fragments&>(s); }

  FLASH_ATTN_DEVICE float (&cell_fragments(int cell))[1][8][4] {  // 64 columns
    return reinterpret_cast<float (&)[1][8][4]>(s[32 * cell]);
  }

  /// `row` is the warpgroup's first.
  FLASH_ATTN_DEVICE FragmentPlace place(const ExtendedTile& tile, int row, int n_block) const {
    return {row + 16 * warp + lane / 4, tile.col_begin + n_block * kBlockN + 2 * (lane % 4)};
  }

  // -- scores

  FLASH_ATTN_DEVICE bool has_dropout() const { return Config::kRules && params.has_dropout; }
  /// Scores are in natural units, see ExtendedParams.
  FLASH_ATTN_DEVICE bool is_natural() const {
    return Config::kBias != Bias::kNone || (Config::kRules && params.natural);
  }

  /// attn_mask's values from where the copy engine has put them.
  FLASH_ATTN_DEVICE void add_staged_bias() {
    mbarrier_wait(&storage().bias_full[warpgroup], num_biased % 2);
    const int row = 16 * warp + lane % 16;
    const uint32_t from = shared_address(storage().bias[warpgroup]) + row * 128;
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      uint32_t words[4];
      ldmatrix_x4(words, from + n / 8 * (64 * 128) + swizzled_chunk(n % 8 + lane / 16, row) * 16);
      add_bias<Element>(fragments()[0][n], words[0], words[1]);
      add_bias<Element>(fragments()[0][n + 1], words[2], words[3]);
    }
    release_staged_bias();
  }

  FLASH_ATTN_DEVICE void release_staged_bias() {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&storage().bias_empty[warpgroup]);
    ++num_biased;
  }

  /// Of a block that this warpgroup passes over.
  FLASH_ATTN_DEVICE void skip_staged_bias() {
    mbarrier_wait(&storage().bias_full[warpgroup], num_biased % 2);
    release_staged_bias();
  }

  /// Of the next block, when those of the block before it have been used: a whole block's time hides the way from
  /// memory. `block` may be one that this warpgroup passes over, or none at all: addresses are clamped.
  FLASH_ATTN_DEVICE void load_bits(const ExtendedTile& tile, VisitedBlock block) {
    if constexpr (Config::kBias == Bias::kNone) {
      if (!params.has_bits) return;
      const mask::PackedMask& packed = params.packed;
      // Of none at all the number is any of 24 bits: as a column it would not be an int.
      const int col_cell = tile.col_begin / mask::kCellCols + block.n_block() * (kBlockN / mask::kCellCols);
      const int last = (packed.col_cells - 1) * packed.col_step;
#pragma unroll
      for (int cell = 0; cell < kBlockN / 64; ++cell) {
        mask_bits[cell].bits[0] = __ldg(first_bits + 32 * min(col_cell + cell, last));
      }
    }
  }

  /// softcap, if all of the warp's scores of 64 columns are small beside the cap, as most are. One that is NaN remains
  /// so either way.
  FLASH_ATTN_DEVICE bool cap_small_scores(int cell) {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < 32; ++i) largest = fmaxf(largest, fabsf(s[32 * cell + i]));
    if (!__all_sync(~0u, largest <= params.cap.largest)) return false;
#pragma unroll
    for (int i = 0; i < 32; ++i) s[32 * cell + i] = params.cap(s[32 * cell + i]);
    return true;
  }

  /// From q.k to scores in natural units, attn_mask excepted. The cap comes by itself, with a division less, and what
  /// is off costs nothing where it is known when the kernel is compiled.
  FLASH_ATTN_DEVICE void apply_score_rules(const ExtendedTile& tile, const FragmentPlace& at) {
    SequenceInfo sequence;
    sequence.diagonal = tile.diagonal;
    ScoreRules rules(params.problem, sequence, 0, 0);
    rules.slope = Config::kRules ? tile.slope : 0.f;
    rules.softcap = 0.f;
    rules.scale = params.scale;
#pragma unroll
    for (int cell = 0; cell < kBlockN / 64; ++cell) {  // of them all at once temporaries would be too many
      if (Config::kRules && params.softcap > 0.f) {
        if (!Config::kCapPolynomial || !cap_small_scores(cell)) {
#pragma unroll
          for (int i = 32 * cell; i < 32 * cell + 32; ++i) s[i] = params.softcap * tanh_by_exp2(s[i] * params.inner);
        }
        rules.scale = 1.f;
      }
      rules.apply(cell_fragments(cell), {at.row, at.col + 64 * cell});
      wgmma_results(s);
    }
  }

  /// From q.k to scores.
  FLASH_ATTN_DEVICE void apply_rules(const ExtendedTile& tile, int row, int n_block) {
    const FragmentPlace at = place(tile, row, n_block);
    if (is_natural()) apply_score_rules(tile, at);
    if constexpr (Config::kBias == Bias::kLoaded) {
      bias.add(fragments(), params, tile, at);
    } else if constexpr (Config::kBias == Bias::kStaged) {
      add_staged_bias();
    } else if (params.has_bits) {
#pragma unroll
      for (int cell = 0; cell < kBlockN / 64; ++cell) mask_bits[cell].apply(cell_fragments(cell));
    }
    if (__builtin_expect(blocks.is_partial(n_block), 0)) {
      mask_scores<true>(s, tile.band(), blocks, n_block, row + warp * 16 + lane / 4,
                        n_block * kBlockN + 2 * (lane % 4));
    }
  }

  FLASH_ATTN_DEVICE void draw_dropout(const ExtendedTile& tile, int row, int n_block) {
    if (!has_dropout()) return;
    kept.draw(storage().dropout, tile.batch * params.problem.num_heads + tile.head, row + 16 * warp,
              tile.col_begin + n_block * kBlockN, lane);
  }

  /// Whether a row of a block of V, in shared memory from `row_begin` on, holds NaN or an infinity.
  FLASH_ATTN_DEVICE bool is_bad_row(uint32_t row_begin) const {
    bool bad = false;
#pragma unroll 1
    for (int i = 0; i < Config::kPanelsV * 8; ++i) {
      uint32_t x[4];
      const int chunk = (i + row_begin / 128) % 8;  // neighbouring lanes read other banks
      load_shared(row_begin + i / 8 * Config::kPanelBytesKV + chunk * 16, x);
#pragma unroll
      for (int j = 0; j < 4; ++j) bad |= is_bad(x[j], kBadExponent<Element>);
    }
    return bad;
  }

  /// Rows of V that no row of the tile sees become 0 if they are not finite: P is 0 there, but 0 times NaN is NaN. Each
  /// consumer does it for itself; they all write the same.
  FLASH_ATTN_DEVICE void clean_v(const ExtendedTile& tile, int n_block) {
    static_assert(kBlockN <= 128, "a row a thread");
    this->wait_v();
    const int row = threadIdx.x % 128;
    const uint32_t row_begin = shared_address(this->shared.v[v.stage]) + row * 128;
    uint32_t unseen = 0;  // rows of the warp
#pragma unroll 1
    for (uint32_t bad = __ballot_sync(~0u, row < kBlockN && is_bad_row(row_begin)); bad != 0; bad &= bad - 1) {
      const int col = n_block * kBlockN + row / 32 * 32 + __ffs(static_cast<int>(bad)) - 1;
      if (is_unseen<Config>(params, tile, col)) unseen |= bad & -bad;
    }
    if ((unseen >> row % 32 & 1) != 0) {
      const uint32_t zero[4] = {0, 0, 0, 0};
#pragma unroll 1
      for (int i = 0; i < Config::kPanelsV * 8; ++i) {
        store_shared(row_begin + i / 8 * Config::kPanelBytesKV + i % 8 * 16, zero);
      }
    }
    async_proxy_fence();  // the product reads it
    named_barrier_sync(kVote + warpgroup, 128);
  }

  // -- the hot loop

  /// S and softmax of this block; under them, if there is one, O += P V of the one before that this warpgroup sees.
  template <bool kAfterOther>
  FLASH_ATTN_DEVICE void process_block(const ExtendedTile& tile, int row, int n_block, VisitedBlock other,
                                       VisitedBlock next) {
    if constexpr (Config::kBias == Bias::kLoaded) bias.load(params, tile, place(tile, row, n_block));
    draw_dropout(tile, row, n_block);
    if (kAfterOther && __builtin_expect(other.is_unclean(), 0)) clean_v(tile, other.n_block());
    this->wait_k();
    this->begin_issue();
    this->issue_qk();
    if constexpr (kAfterOther) {
      this->wait_v();
      this->issue_pv();
    }
    this->end_issue();
    wgmma_wait<kAfterOther ? 1 : 0>();
    wgmma_results(s);
    this->release_k();
    apply_rules(tile, row, n_block);
    load_bits(tile, next);
    softmax.advance(s);
    if constexpr (kAfterOther) {
      wgmma_wait<0>();
      wgmma_results(out);
      this->release_v();
    }
    this->pack_p();
    if (has_dropout()) {
#pragma unroll
      for (int pair = 0; pair < 2 * kTilesN; ++pair) this->p[pair] &= kept.mask(0, pair);
    }
    wgmma_discard(s);
    this->rescale_out();
  }

  FLASH_ATTN_DEVICE void finish_pv(const ExtendedTile& tile, VisitedBlock other) {
    if (__builtin_expect(other.is_unclean(), 0)) clean_v(tile, other.n_block());
    this->finish_last_pv();
  }

  // -- epilogue

  /// Of one of the thread's rows, after the last block: the sum, relative to `high` in units of S, and what O is to be
  /// multiplied by to be relative to it; 0: the row has seen nothing.
  FLASH_ATTN_DEVICE float finish_row(const ExtendedTile& tile, int r, float& sum, float& high) {
    const ForwardParams& p = params.problem;
    sum = quad_sum(softmax.row_sum[r]);
    high = softmax.row_max[r];
    // Without a maximum the sum is 0, or NaN if all scores are.
    float factor = high == -INFINITY ? sum : 1.f;
    if (p.sinks != nullptr && tile.part == 0) {
      const float sink = static_cast<const float*>(p.sinks)[tile.head] / params.to_natural, top = fmaxf(high, sink);
      if (sink != -INFINITY) {
        factor = high == -INFINITY ? sum : fast_exp2((high - top) * params.to_log2);
        sum = sum * factor + fast_exp2((sink - top) * params.to_log2);
        high = top;
      }
    }
    return has_dropout() ? factor * static_cast<float>(storage().dropout.scale) : factor;
  }

  FLASH_ATTN_DEVICE void store_tile(const ExtendedTile& tile, int row) {
    float lse[2], inverse[2];
    bool zero[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum, high;
      const float factor = finish_row(tile, r, sum, high);
      const bool exists = row + lane / 4 + 8 * r < tile.seqlen_q;
      lse[r] = sum == 0.f || !exists ? -INFINITY : log_sum_exp(high, params.to_natural, sum);
      zero[r] = factor == 0.f || sum == 0.f || !exists;
      inverse[r] = __fdividef(factor, sum);
    }
    this->store_rows(tile, row, lse, inverse, zero);
  }

  /// One part of a split tile, for combine.h; `row` is this thread's first, of the partial results.
  FLASH_ATTN_DEVICE void store_part(const ExtendedTile& tile, int64_t row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum, high;
      const float factor = finish_row(tile, r, sum, high);
#pragma unroll
      for (int i = 0; i < Config::kHeadDimV / 2; ++i) {
        if (i / 2 % 2 == r) out[i] = factor == 0.f ? 0.f : out[i] * factor;
      }
      softmax.row_max[r] = high;
      softmax.row_sum[r] = lane % 4 == 0 ? sum : 0.f;
    }
    this->store_partial(row);
  }

  // -- tiles

  FLASH_ATTN_DEVICE void process_tile(const ExtendedTile& tile) {
    const int row = tile.m_begin + 64 * warpgroup;
    const bool idle = row >= tile.num_rows;
    blocks = column_blocks<kBlockN, true>(tile.band(), row, tile.num_blocks);
    if (idle) blocks.end = 0;
#pragma unroll
    for (int i = 0; i < Config::kHeadDimV / 2; ++i) out[i] = 0.f;
    softmax.start();
    VisitedBlock other{0};  // whose P V is still to be added
    const bool listed = tile.listed;
    VisitedBlock next = storage().visited(tiles.slot(), listed, 0);
    const int count = tile.num_visited;
    if (Config::kBias == Bias::kNone && params.has_bits) {
      const mask::PackedMask& packed = params.packed;
      const int row_cell = min((row + 16 * warp) / mask::kCellRows, packed.row_cells - 1);
      first_bits = packed.bits + packed.cell(tile.batch, tile.head, row_cell, 0) * 32 + lane;
    }
    load_bits(tile, next);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const VisitedBlock block = next;
      next = storage().visited(tiles.slot(), listed, i + 1);  // beyond the last one: nothing that is used
      const int n_block = block.n_block();
      if (__builtin_expect(block.is_seen_by(warpgroup) && n_block >= blocks.begin && n_block < blocks.end, 1)) {
        if (__builtin_expect(other.word != 0, 1)) {
          process_block<true>(tile, row, n_block, other, next);
        } else {
          process_block<false>(tile, row, n_block, other, next);
        }
        other = block;
        this->release_out_stage();
      } else {
        if (other.word != 0) finish_pv(tile, other);
        other.word = 0;
        load_bits(tile, next);
        this->skip_blocks(1);
        if constexpr (Config::kBias == Bias::kStaged) skip_staged_bias();
      }
    }
    this->release_out_stage();
    if constexpr (Config::kOutBuffer) {
      if (lane == 0) mbarrier_arrive(&this->shared.q_empty[tiles.stage()]);  // read for the last time
    }
    if (other.word != 0) finish_pv(tile, other);
    if (!idle && tile.partial_row < 0) store_tile(tile, row + 16 * warp);
    if (!idle && tile.partial_row >= 0) store_part(tile, tile.partial_row + 64 * warpgroup + 16 * warp + lane / 4);
    if (!Config::kOutBuffer) this->out_stage = tiles.stage();
  }

  FLASH_ATTN_DEVICE void run() {
    if (warpgroup == Config::kConsumers - 1) this->end_issue();  // the first turn is consumer 0's
    for (;; ++tiles.count) {
      mbarrier_wait(&this->shared.q_full[tiles.stage()], tiles.phase());
      const ExtendedTile& tile = this->shared.tiles[tiles.slot()];
      if (tile.num_blocks == 0) break;
      process_tile(tile);
    }
    if (lane == 0) tma_store_wait();  // shared memory must outlive the stores
  }
};

}  // namespace flash_attn::cuda::sm90::forward
