// A block of the forward kernel: what it holds, and the loop over tiles of keys. See kernel.h.
#pragma once

#include "../../common/scores/dropout_bits.h"
#include "../../common/scores/scores.h"
#include "../products.h"
#include "../softmax.h"
#include "../tile_copy.h"
#include "config.h"
#include "schedule/tile.h"
#include "scores/bias_fragments.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
struct ForwardBlock {
  using Element = typename Config::Element;
  using Tile = SharedTile<Config::kHeadDim>;
  using PTile = SharedTile<Config::kBlockN>;
  static constexpr int kMTiles = Config::kMTiles, kNTiles = Config::kNTiles, kDTiles = Config::kDTiles;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kSubN = Config::kSubN;
  static constexpr int kWarpsD = Config::kWarpsD;
  static constexpr bool kDropout = Config::kRules == Rules::kDropout, kMask = Config::kRules == Rules::kMask,
                        kBias = Config::kBias, kExtended = Config::kExtended, kMasks = kMask || kBias || kExtended;
  static_assert(!kMasks || kBlockN <= 128);
  static constexpr int kAliveWords = 4 * Config::kWarps;  // see `alive`
  static constexpr uint32_t kAllColumns = ~0u >> (32 - 2 * kBlockN / 8), kAllOfWarp = ~0u >> (32 - 2 * kNTiles);
  using Scores = float[kMTiles][kNTiles][4];
  using KvCopy = TileCopy<kBlockN, Config::kHeadDim, Config::kThreads>;

  const ForwardKernelParams& params;
  const ForwardTile& tile;
  const ForwardParams& p;
  unsigned char* const shared;  // q, the ring's slots, `seen`
  const int warp, lane;
  // With masks: what columns of a tile each warp sees. Word lane % 4 of its four: a bit for each of a lane's
  // fragments'.
  uint32_t* const alive;
  const int first_block, first_full, last_full;  // of the tile: asked for in every block
  uint32_t k_slot;                               // that K is read from; V lies in the one after it
  int load_block;                                // whose K, or after it V, is loaded next
  // This thread's first piece of those; worked out for each tile where tiles are left out.
  static constexpr bool kPointers = Config::kRules == Rules::kPlain || kDropout;
  const char *k_from, *v_from;
  float o[kMTiles][kDTiles][4];
  Scores s;
  uint32_t packed[kNTiles / 2][kMTiles][4];   // P, where Config::kPacks
  MaskFragments<kMTiles, kNTiles> mask_bits;  // of the tile whose S is computed next, as are `bias` and which of them
  bool is_biased;
  BiasFragments<Element, kMTiles, kNTiles> bias;
  KeptFragments<kMTiles, kDropout ? kNTiles : 8> kept;  // of Rules::kDropout: what it keeps of that tile
  using Softmax = OnlineSoftmax<kMTiles, kNTiles, Config::kNatural>;
  Softmax softmax;

  SM80_DEVICE ForwardBlock(const ForwardKernelParams& kernel_params, const ForwardTile& t,
                           unsigned char* dynamic_shared, uint32_t* alive_columns)
      : params(kernel_params),
        tile(t),
        p(kernel_params.problem),
        shared(dynamic_shared),
        warp(int(threadIdx.x) / 32),
        lane(int(threadIdx.x) % 32),
        alive(alive_columns),
        first_block(t.block_begin),
        first_full(t.full_begin),
        last_full(t.full_end),
        k_slot(slots_begin()),
        load_block(t.block_end - 1),
        softmax(float(p.softmax_scale)) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int d = 0; d < kDTiles; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][d][i] = 0.f;
  }

  // -- shared memory

  SM80_DEVICE uint32_t q_tile() const { return shared_address(shared); }
  SM80_DEVICE uint32_t slots_begin() const { return q_tile() + Config::kQueryBytes; }
  SM80_DEVICE uint32_t slots_end() const { return q_tile() + Config::kSlotsEnd; }
  /// With masks: of every 64 columns from seen_begin() on, those that some row sees.
  SM80_DEVICE uint64_t* seen() const { return reinterpret_cast<uint64_t*>(shared + Config::kTileBytes); }

  // -- which tiles are visited: those with a column that some row sees

  static constexpr int kSeenWords = (kBlockN + 63) / 64;  // of a tile
  static_assert(!kMasks || 64 % kBlockN == 0 || kBlockN % 64 == 0);

  SM80_DEVICE bool has_seen() const { return params.packed.seen != nullptr; }
  SM80_DEVICE int seen_begin() const { return block_begin() * kBlockN / 64; }

  SM80_DEVICE uint64_t find_seen(int col_cell) const;

  /// All threads; a barrier stands at the end.
  SM80_DEVICE void fill_seen();

  /// Word w of a tile's columns: a bit for each that some row sees.
  SM80_DEVICE uint64_t seen_columns(int block, int w) const;

  /// The last visited tile up to `block`; one before block_begin(): none.
  SM80_DEVICE int visited_block(int block) const;

  // -- loading

  SM80_DEVICE uint32_t slot_after(uint32_t slot, int steps) const {
    slot += steps * Config::kSlotBytes;
    return slot >= slots_end() ? slot - (slots_end() - slots_begin()) : slot;
  }
  SM80_DEVICE uint32_t slot_before(uint32_t slot) const {
    return (slot == slots_begin() ? slots_end() : slot) - Config::kSlotBytes;
  }

  SM80_DEVICE int block_begin() const { return Config::kFewRegisters ? tile.block_begin : first_block; }
  SM80_DEVICE int full_begin() const { return Config::kFewRegisters ? tile.full_begin : first_full; }
  SM80_DEVICE int full_end() const { return Config::kFewRegisters ? tile.full_end : last_full; }

  SM80_DEVICE void load_q();

  /// Once load_block is known.
  SM80_DEVICE void begin_loads();

  /// The ring's next tile, if there is one; in any case a group of copies, so that groups can be counted.
  template <bool kOfK>
  SM80_DEVICE void load_next(uint32_t slot);
  template <bool kOfK>
  SM80_DEVICE void load_part(uint32_t slot) const;
  /// Of load_block: keys that some row sees, and zeros for the others; `columns` of them, and zeros. `from`, `step`: of
  /// this thread's first piece, and from one of its rows to the next.
  SM80_DEVICE void copy_part(uint32_t slot, const char* from, int64_t step, int columns) const;

  static constexpr int kSlots = Config::kSlots;
  static constexpr bool kSameAhead = kSlots % 2 == 1;  // what comes kSlots - 1 tiles after a V is a V, or a K

  /// Until the next tile of the ring is there for all warps, who all are done with the one before it.
  SM80_DEVICE void wait_tile() {
    cp_async_wait<kSlots - 2>();
    __syncthreads();
  }
  /// V of the tile whose K is in k_slot.
  SM80_DEVICE void wait_v() {
    wait_tile();
    load_next<!kSameAhead>(k_slot);
  }
  /// K of the next tile, `block`, which k_slot moves to.
  SM80_DEVICE void wait_k(int block) {
    wait_tile();
    if constexpr (kBias && Config::kHasP) {
      load_bias(block);
      cp_async_commit();
    }
    load_next<kSameAhead>(slot_after(k_slot, 1));
    k_slot = slot_after(k_slot, 2);
  }

  // -- products

  // Rows of the block, keys of a tile and columns of O that this warp has.
  SM80_DEVICE int warp_row() const { return warp / kWarpsD * Config::kWarpRows; }
  SM80_DEVICE int warp_key() const { return warp % kWarpsD * kSubN; }
  /// Chunk, that is eight columns, number d of this warp's: every kWarpsD-th pair, see multiply_step().
  SM80_DEVICE int chunk(int d) const { return 2 * (d / 2 * kWarpsD + warp % kWarpsD) + d % 2; }

  SM80_DEVICE void multiply_qk() {
    constexpr int kSteps = Config::kHeadDim / 16;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
    constexpr int kUnroll = Config::kFewRegisters ? 2 : kSteps;  // ptxas would spill registers
#else
    constexpr int kUnroll = kSteps;
#endif
    multiply_rows<Element, Config::kHeadDim, kUnroll>(s, address_by_rows<Tile>(q_tile(), warp_row(), lane),
                                                      address_by_columns<Tile>(k_slot, warp_key(), lane),
                                                      [](int) { return float2{0.f, 0.f}; });
  }

  SM80_DEVICE void take_exponentials() {
#pragma unroll
    for (int f = 0; f < kMTiles * kNTiles; ++f) softmax.exponentials(s, f / kNTiles, f % kNTiles);
  }

  /// P of 16 keys as A fragments.
  SM80_DEVICE void pack_probabilities(int k, uint32_t (&a)[kMTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[m][i] = pack<Element>(s[m][2 * k + i / 2][i % 2 * 2], s[m][2 * k + i / 2][i % 2 * 2 + 1]);
        if constexpr (kDropout) a[m][i] &= kept.mask(m, 4 * k + i);
      }
    }
  }

  /// O += P V. Exponentials of 16 keys beside the products of the 16 before: each keeps a warp for eight clocks in
  /// which nothing but another one has to wait.
  SM80_DEVICE void multiply_own_p(uint32_t v_slot) {
    const uint32_t v = address_by_rows<Tile>(v_slot, 0, lane);
#pragma unroll
    for (int k = 0; k < kNTiles / 2; ++k) {
      const uint32_t v_rows = v + k * 16 * Tile::kRowBytes;
      if constexpr (Config::kPacks) {
        multiply_step<Element, Config::kHeadDim, 1>(o, packed[k], v_rows);
      } else {
        if constexpr (Config::kBeside) {
#pragma unroll
          for (int f = 0; f < 2 * kMTiles; ++f) softmax.exponentials(s, f / 2, 2 * k + f % 2);
        }
        uint32_t a[kMTiles][4];
        pack_probabilities(k, a);
        multiply_step<Element, Config::kHeadDim, 1>(o, a, v_rows);
      }
    }
  }

  /// The same of all keys of a tile where warps share them out.
  SM80_DEVICE void multiply_shared_p(uint32_t v_slot);

  /// What all warps of the rows need of this one's keys, seen by them after the next barrier.
  SM80_DEVICE void store_probabilities() const;

  // -- scores; `col` is the first column of them

  SM80_DEVICE FragmentPlace place(int col) const {
    return {tile.m_begin + warp_row() + lane / 4, col + 2 * (lane % 4)};
  }

  /// Before S of a tile is computed: what dropout will keep of it, where S leaves registers.
  SM80_DEVICE void draw_kept(int col);

  /// Likewise: what of attn_mask it will need.
  SM80_DEVICE void load_mask(int col);

  // Of Rules::kBias: each warp's rows and keys of the mask, by cp.async. Where P is in shared memory biases take its
  // place, from when all are done with it until the warp has its own; else they have a place of their own.

  using BiasTile = SharedTile<kBlockN>;
  /// Of a tile; `block` before block_begin(): there is none.
  SM80_DEVICE void load_bias(int block) const;
  /// From S of the tile to scores, in natural units. Returns whether the warp has a bias of -inf.
  SM80_DEVICE bool add_bias();

  /// From S, as it was computed, to what exponentials are taken of. Returns whether attn_mask may hide some of them.
  SM80_DEVICE bool apply_rules(int col);

  /// In extended kernels: P of what dropout takes away becomes 0.
  SM80_DEVICE void drop(int col);

  SM80_DEVICE void rescale() {
    typename Softmax::RowValues largest;
    softmax.find_largest(s, largest);
    if constexpr (kWarpsD > 1) {
      combine_rows(largest, [](float x) { return quad_max(x); }, [](float x, float y) { return fmaxf(x, y); });
    }
    softmax.rescale(s, largest, [&](int m, int r, float factor) {
#pragma unroll
      for (int d = 0; d < kDTiles; ++d) o[m][d][2 * r] *= factor, o[m][d][2 * r + 1] *= factor;
    });
  }

  /// A number a row becomes that of all its keys: of the quad's lanes, and then of all warps that have the row.
  template <typename OfQuad, typename OfTwo>
  SM80_DEVICE void combine_rows(typename Softmax::RowValues& x, const OfQuad& of_quad, const OfTwo& of_two) const;

  // With attn_mask, a key that no row of the tile sees may have NaN in V, and 0 times that is NaN: its row of V becomes
  // 0.

  /// Whether `seen` has not told the loader all: it knows of attn_mask alone, and other bounds may hide a key from just
  /// those rows that the mask shows it to. Then each warp tells what it sees.
  SM80_DEVICE bool may_have_unseen_v(int block) const {
    if (!kMasks || p.mask.data == nullptr) return false;
    return (!kMask && !has_seen()) || block * kBlockN < full_begin() || (block + 1) * kBlockN > full_end();
  }

  /// Before a barrier, V's arrival. Bit 2 n + c: of column 8 n + 2 (lane % 4) + c of the fragments, for the lane's
  /// rows.
  SM80_DEVICE void tell_seen_columns(uint32_t columns) const;
  /// Likewise, from the tile's scores. `hides`: attn_mask may hide some of them.
  SM80_DEVICE void tell_seen_scores(int block, bool hides) const;
  SM80_DEVICE uint32_t columns_of_scores() const;

  /// Kernels of Rules::kMask join other bounds with the bits of attn_mask, before S is computed, and tell the columns.
  SM80_DEVICE void limit_mask_bits(int col);

  /// All threads call it, after that barrier and before the product; a barrier stands at the end if V changes.
  SM80_DEVICE void clear_unseen_v(uint32_t v_slot) const;

  // -- the loop over tiles

  /// O += P V of a tile.
  SM80_DEVICE void multiply_pv(int block, uint32_t v_slot) {
    if constexpr (kMasks) {
      if (may_have_unseen_v(block)) clear_unseen_v(v_slot);
    }
    if constexpr (kWarpsD > 1) {
      multiply_shared_p(v_slot);
    } else {
      drop(block * kBlockN + warp_key());
      multiply_own_p(v_slot);
    }
  }

  /// From S of a tile, whose K is in k_slot, to O.
  SM80_DEVICE void finish_tile(int block) {
    const int col = block * kBlockN + warp_key();
    const bool hides = apply_rules(col);
    if constexpr (kBias && !Config::kHasP) load_bias(visited_block(block - 1));
    if constexpr (kBias || kExtended) {
      if (may_have_unseen_v(block)) tell_seen_scores(block, hides);
    }
    rescale();
    if constexpr (!Config::kBeside) take_exponentials();
    if constexpr (Config::kPacks) {
#pragma unroll
      for (int k = 0; k < kNTiles / 2; ++k) pack_probabilities(k, packed[k]);
    }
    if constexpr (kWarpsD > 1) {
      drop(col);
      store_probabilities();
    }
    wait_v();
    multiply_pv(block, slot_after(k_slot, 1));
  }

  /// After a tile: K of the next one is in k_slot.
  SM80_DEVICE void begin_tile(int block) {
    load_mask(block * kBlockN + warp_key());
    draw_kept(block * kBlockN + warp_key());
    wait_k(block);
  }

  SM80_DEVICE void run() {
    if constexpr (kMasks) {
      if (kMask || has_seen()) fill_seen();
    }
    int block = load_block = visited_block(tile.block_end - 1);
    load_q();  // arrives with the first tile
    if (block >= block_begin()) {
      load_mask(block * kBlockN + warp_key());
      begin_loads();
      if constexpr (kBias) load_bias(block);
      load_next<true>(slots_begin());
      load_next<false>(slots_begin() + Config::kSlotBytes);
      draw_kept(block * kBlockN + warp_key());
      cp_async_wait<1>();
      __syncthreads();  // Q and the first K are there
      if constexpr (kSlots == 3) load_next<true>(slots_end() - Config::kSlotBytes);
      for (;;) {
        if constexpr (kMask) {
          if (may_have_unseen_v(block)) limit_mask_bits(block * kBlockN + warp_key());
        }
        multiply_qk();
        finish_tile(block);
        block = visited_block(block - 1);
        if (block < block_begin()) break;
        begin_tile(block);
      }
    }
    cp_async_commit();  // of Q, if no tile was visited
    cp_async_wait<0>();
    __syncthreads();  // out goes through Q, which all have copied and are done with
    store();
  }

  // -- epilogue

  /// Divides O by the sum; out goes through this warp's rows of Q, so that whole 16-byte pieces are stored.
  SM80_DEVICE void store();

  SM80_DEVICE void store_rows();

  /// Of a tile whose keys several blocks share out: O as it is, and the rows' maxima and sums, for combine.
  SM80_DEVICE void store_part(const typename Softmax::RowValues& sums, float dropout_scale) const;
};

}  // namespace flash_attn::cuda::sm80
