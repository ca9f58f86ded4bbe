// A block of the forward kernel for float32: what it holds, and the loop over tiles of keys. See kernel.h.
#pragma once

#include "../../forward/schedule/tile.h"
#include "../products.h"
#include "../rules.h"
#include "config.h"
#include "params.h"
#include "softmax.h"

namespace flash_attn::cuda::sm80::fp32 {

/// In shared memory, where it is read again wherever it is needed: it would take thirty registers.
struct ForwardPlace : ForwardTile {
  const __half *k_source, *v_source;         // row 0 of the sequence, this KV head's
  const float *q_units, *k_units, *v_units;  // of its tiles

  SM80_DEVICE void find_sources(const ForwardKernelParams& params) {
    const bool packed_q = params.problem.cu_seqlens_q != nullptr, packed_k = params.problem.cu_seqlens_k != nullptr;
    k_source = params.k.head_data(packed_k, batch, sequence.k_row, kv_head);
    v_source = params.v.head_data(packed_k, batch, sequence.k_row, kv_head);
    q_units = params.q.head_units(packed_q, batch, sequence.q_row, head);
    k_units = params.k.head_units(packed_k, batch, sequence.k_row, kv_head);
    v_units = params.v.head_units(packed_k, batch, sequence.k_row, kv_head);
  }
};

/// The last tile up to `block` of which attn_mask shows something; one before block_begin: none.
template <typename Config>
SM80_DEVICE int visited_block(const ForwardKernelParams& params, const ForwardPlace& tile, int block) {
  if constexpr (Config::kExtended) {
    if (params.packed.seen == nullptr) return block;
    for (; block >= tile.block_begin; --block) {
      if ((params.packed.tile_classes<Config::kBlockM, Config::kBlockN>(tile.batch, tile.head, tile.m_begin,
                                                                        block * Config::kBlockN) &
           mask::kSeen) != 0) {
        break;
      }
    }
  }
  return block;
}

template <typename Config>
struct ForwardBlock {
  static constexpr int kMTiles = Config::kMTiles, kNTiles = Config::kNTiles, kDTiles = Config::kDTiles;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  static constexpr bool kExtended = Config::kExtended;
  static constexpr int kLeastSlots = 2;  // of the ring
  using Scores = float[kMTiles][kNTiles][4];

  const ForwardKernelParams& params;
  const ForwardPlace& tile;
  const ForwardParams& p;
  const uint32_t shared;         // q, the ring's slots
  float q_unit, k_unit, v_unit;  // of this warp's rows; of the tile whose S is computed next
  uint32_t k_slot;               // that K is read from; V lies in the one after it
  int load_block;                // whose K, or after it V, is loaded next
  float o[kMTiles][kDTiles][4];
  Scores s;
  OnlineSoftmax<kMTiles, kNTiles> softmax;

  SM80_DEVICE ForwardBlock(const ForwardKernelParams& kernel_params, const ForwardPlace& t, uint32_t shared_memory)
      : params(kernel_params),
        tile(t),
        p(kernel_params.problem),
        shared(shared_memory),
        k_slot(slots_begin()),
        load_block(visited_block(t.block_end - 1)),
        softmax(kExtended ? 1.f : float(p.softmax_scale)) {
    const int row = min(t.m_begin + warp() * Config::kWarpRows, int(t.sequence.seqlen_q) - 1);
    q_unit = t.q_units[row / kTileRows];
    clear(o);
  }

  // Of this thread; see fresh_thread().
  SM80_DEVICE int lane() const { return int(fresh_thread(load_block) % 32); }
  SM80_DEVICE int warp() const { return int(fresh_thread(load_block) / 32); }

  SM80_DEVICE bool is_packed_q() const { return p.cu_seqlens_q != nullptr; }
  SM80_DEVICE bool is_packed_k() const { return p.cu_seqlens_k != nullptr; }

  SM80_DEVICE int visited_block(int block) const { return fp32::visited_block<Config>(params, tile, block); }

  // -- shared memory

  SM80_DEVICE uint32_t q_tile() const { return shared; }
  SM80_DEVICE uint32_t slots_begin() const { return shared + Config::kQueryBytes; }
  SM80_DEVICE uint32_t slots_end() const { return slots_begin() + params.slots * Config::kSlotBytes; }
  SM80_DEVICE uint32_t slot_after(uint32_t slot, int steps) const {
    slot += steps * Config::kSlotBytes;
    return slot >= slots_end() ? slot - (slots_end() - slots_begin()) : slot;
  }

  // -- loading

  SM80_DEVICE void load_q() const;
  /// The ring's next tile, if there is one; in any case a group of copies, so that groups can be counted.
  SM80_DEVICE void load_next(uint32_t slot, bool load_k);

  /// Until the next tile of the ring is there for all warps, who all are done with the one before it.
  SM80_DEVICE void wait_tile() {
    switch (params.slots) {
      case 2: cp_async_wait<0>(); break;
      case 3: cp_async_wait<1>(); break;
      default: cp_async_wait<2>(); break;
    }
    Config::Products::release_copies();
    __syncthreads();
  }
  /// V of the tile whose K is in k_slot.
  SM80_DEVICE void wait_v() {
    wait_tile();
    load_next(k_slot, params.slots % 2 == 0);
  }
  /// K of the next tile, which k_slot moves to.
  SM80_DEVICE void wait_k() {
    wait_tile();
    load_next(slot_after(k_slot, 1), params.slots % 2 != 0);
    k_slot = slot_after(k_slot, 2);
  }

  // -- products

  /// s = Q K^T of a tile, in units of q_unit * k_unit.
  SM80_DEVICE void multiply_qk() {
    Config::Products::template multiply_rows<Config::kHeadDim, Config::kSumSteps, kBlockM, kBlockN>(s, q_tile(), k_slot,
                                                                                                    *this);
  }

  // -- the loop over tiles

  SM80_DEVICE FragmentPlace place(int col) const {
    const int at = lane();
    return {tile.m_begin + warp() * Config::kWarpRows + at / 4, col + 2 * (at % 4)};
  }

  /// Scores in natural units: softcap, ALiBi, attn_mask.
  SM80_DEVICE void apply_rules(int col, float unit) {
    const FragmentOrigin at{place(col).row, place(col).col};
    const HeadRules<false, kMTiles, kNTiles> rules(p, tile.sequence, tile.batch, tile.head);
    rules.scale_scores(s, unit);
    if (rules.slope != 0.f) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int n = 0; n < kNTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][n][i] = rules.add_slope(s[m][n][i], rules.distance(at, m, n, i));
    }
    if (p.mask.data == nullptr) return;
    const int row = tile.m_begin + warp() * Config::kWarpRows;
    if (!__any_sync(~0u,
                    adds_values<Config::kWarpRows, kBlockN>(p.mask, params.packed, tile.batch, tile.head, row, col))) {
      MaskFragments<kMTiles, kNTiles> shown;
      shown.load(params.packed, tile.batch, tile.head, row, col);
      return shown.apply(s);
    }
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int n = 0; n < kNTiles; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float2 bias = rules.bias_of(at, m, n, r);
          s[m][n][2 * r] = rules.add_bias(s[m][n][2 * r], bias.x);
          s[m][n][2 * r + 1] = rules.add_bias(s[m][n][2 * r + 1], bias.y);
        }
  }

  SM80_DEVICE void drop(int col) {
    if (p.dropout_p > 0.0) {
      apply_dropout(s, make_dropout(p.rng_state, p.dropout_p), tile.batch * p.num_heads + tile.head, place(col));
    }
  }

  SM80_DEVICE void rescale(const float (&factor)[kMTiles][2]) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int d = 0; d < kDTiles; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][d][i] *= factor[m][i / 2];
  }

  SM80_DEVICE void load_units(int block) {
    const int at = block * kBlockN / kTileRows;
    k_unit = __ldg(tile.k_units + at);
    v_unit = __ldg(tile.v_units + at);
  }

  /// On entry S of the tile is computed; on exit, with kNext, that of the next one.
  template <bool kNext>
  SM80_DEVICE void process(int block, int next) {
    const int col = block * kBlockN;
    float score_unit = q_unit * k_unit;
    const float value_unit = v_unit / kPScale;
    if constexpr (kNext) load_units(next);
    if constexpr (kExtended) {
      apply_rules(col, score_unit);
      score_unit = 1.f;
    }
    if (col < tile.full_begin || col + kBlockN > tile.full_end) {
      mask_columns(s, place(col), ColumnBounds(p, tile.sequence));
    }
    float factor[kMTiles][2];
    if (softmax.advance(s, score_unit, factor)) rescale(factor);
    if constexpr (kExtended) drop(col);
    PairFragment pairs[kNTiles / 2][kMTiles];
    split_fragments(s, pairs, [](int, int) { return kPScale; });
    wait_v();
    const uint32_t v_slot = slot_after(k_slot, 1);
    const auto unit = [=](int, int) { return value_unit; };
    Config::Products::template add_product<Config::kHeadDim, Config::kAhead>(o, pairs, v_slot, unit, *this);
    if constexpr (kNext) {
      wait_k();
      multiply_qk();
    }
  }

  SM80_DEVICE void run() {
    load_q();  // arrives with the first tile
    int block = load_block;
    if (block >= tile.block_begin) {
      load_units(block);
      const int ahead = params.slots - 1;
      for (int i = 0; i < ahead; ++i) load_next(slots_begin() + i * Config::kSlotBytes, i % 2 == 0);
      wait_tile();  // Q and the first K
      load_next(slots_begin() + ahead * Config::kSlotBytes, ahead % 2 == 0);
      multiply_qk();
      for (int next = visited_block(block - 1); next >= tile.block_begin; next = visited_block(block - 1)) {
        process<true>(block, next);
        block = next;
      }
      process<false>(block, block);
    }
    cp_async_wait<0>();
    store();
  }

  // -- epilogue

  /// Divides O by the sum.
  SM80_DEVICE void store();
};

}  // namespace flash_attn::cuda::sm80::fp32
