// A block of the forward kernel: what it holds, and the loop over tiles of keys. See kernel.h.
#pragma once

#include "../../common/scores/scores.h"
#include "../products.h"
#include "../softmax.h"
#include "config.h"
#include "schedule/tile.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
struct ForwardBlock {
  using Element = typename Config::Element;
  using Tile = SharedTile<Config::kHeadDim>;
  using PTile = SharedTile<Config::kBlockN>;
  static constexpr int kMTiles = Config::kMTiles, kNTiles = Config::kNTiles, kDTiles = Config::kDTiles;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kSubN = Config::kSubN;
  static constexpr int kWarpsD = Config::kWarpsD;
  static constexpr bool kExtended = Config::kExtended;
  using Scores = float[kMTiles][kNTiles][4];
  using KvCopy = TileCopy<kBlockN, Config::kHeadDim, Config::kThreads>;

  const ForwardKernelParams& params;
  const ForwardTile& tile;
  const ForwardParams& p;
  unsigned char* const shared;  // q, the ring's slots, `seen`
  const int warp, lane;
  uint32_t* const alive;                         // extended: which columns of a half some row sees, if not in `seen`
  const int first_block, first_full, last_full;  // of the tile: asked for in every block
  uint32_t k_slot;                               // that K is read from; V lies in the one after it
  int load_block;                                // whose K, or after it V, is loaded next
  const char *k_from, *v_from;                   // plain: this thread's first piece of those
  float o[kMTiles][kDTiles][4];
  Scores s[Config::kHalves ? 2 : 1];          // of a tile, or of its two halves
  MaskFragments<kMTiles, kNTiles> mask_bits;  // of the half whose S is computed next, as are `bias` and which of them
  bool is_biased;
  BiasFragments<Element, kMTiles, kNTiles> bias;
  using Softmax = OnlineSoftmax<kMTiles, kNTiles, kExtended>;
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
  /// Extended: of every 64 columns from seen_begin() on, those that some row sees.
  SM80_DEVICE uint64_t* seen() const { return reinterpret_cast<uint64_t*>(shared + Config::kTileBytes); }

  // -- which tiles are visited: those with a column that some row sees

  static constexpr int kSeenWords = (kBlockN + 63) / 64;  // of a tile
  static_assert(!kExtended || 64 % kBlockN == 0 || kBlockN % 64 == 0);

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

  SM80_DEVICE const Element* source_of(const TensorView& view) const {
    return static_cast<const Element*>(view.data) + tile.batch_offset(view, p.cu_seqlens_k != nullptr) +
           int64_t{tile.kv_head} * view.head + tile.sequence.k_row * view.row;
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

  static constexpr bool kHalves = Config::kHalves;
  static constexpr int kSlots = Config::kSlots, kHeld = Config::kHeld;
  // What comes kSlots - kHeld tiles after a V is a V, or a K.
  static constexpr bool kSameAhead = (kSlots - kHeld) % 2 == 0;

  /// Until the next tile of the ring is there for all warps, who all are done with the one kHeld before it.
  SM80_DEVICE void wait_tile() {
    cp_async_wait<kSlots - kHeld - 1>();
    __syncthreads();
  }
  /// V of the tile whose K is in k_slot.
  SM80_DEVICE void wait_v() {
    wait_tile();
    load_next<!kSameAhead>(kHeld == 2 ? slot_before(k_slot) : k_slot);
  }
  /// K of the next tile, which k_slot moves to.
  SM80_DEVICE void wait_k() {
    wait_tile();
    load_next<kSameAhead>(kHeld == 2 ? k_slot : slot_after(k_slot, 1));
    k_slot = slot_after(k_slot, 2);
  }

  // -- products

  // Rows of the block, keys of a tile and columns of O that this warp has.
  SM80_DEVICE int warp_row() const { return warp / kWarpsD * Config::kWarpRows; }
  SM80_DEVICE int warp_key() const { return warp % kWarpsD * kSubN; }
  /// Chunk, that is eight columns, number d of this warp's.
  SM80_DEVICE int chunk(int d) const { return warp % kWarpsD * kDTiles + d; }

  /// S = Q K^T of one half of a tile; with kExp the exponentials of `other` on the way.
  template <int kHalf, bool kExp>
  SM80_DEVICE void multiply_qk(Scores& scores, Scores& other) {
    constexpr int kSteps = Config::kHeadDim / 16, kFragments = kMTiles * kNTiles;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
    constexpr int kUnroll = Config::kFewRegisters ? 2 : kSteps;  // ptxas would spill registers
#else
    constexpr int kUnroll = kSteps;
#endif
    multiply_rows<Element, Config::kHeadDim, kUnroll>(
        scores, address_by_rows<Tile>(q_tile(), warp_row(), lane),
        address_by_columns<Tile>(k_slot, kHalf * kSubN + warp_key(), lane), [](int) { return float2{0.f, 0.f}; },
        [&](int d) {
          if constexpr (kExp) {
#pragma unroll
            for (int f = d * kFragments / kSteps; f < (d + 1) * kFragments / kSteps; ++f) {
              softmax.exponentials(other, f / kNTiles, f % kNTiles);
            }
          }
        });
  }

  SM80_DEVICE void take_exponentials(Scores& scores) {
#pragma unroll
    for (int f = 0; f < kMTiles * kNTiles; ++f) softmax.exponentials(scores, f / kNTiles, f % kNTiles);
  }

  /// P of 16 keys as A fragments.
  SM80_DEVICE void pack_probabilities(const Scores& probabilities, int k, uint32_t (&a)[kMTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[m][i] =
            pack<Element>(probabilities[m][2 * k + i / 2][i % 2 * 2], probabilities[m][2 * k + i / 2][i % 2 * 2 + 1]);
  }

  /// O += P V of one half of a tile.
  template <int kHalf>
  SM80_DEVICE void multiply_pv(const Scores& probabilities, uint32_t v_slot) {
    const uint32_t v = address_by_rows<Tile>(v_slot, kHalf * kSubN, lane);
#pragma unroll
    for (int k = 0; k < kNTiles / 2; ++k) {
      uint32_t a[kMTiles][4];
      pack_probabilities(probabilities, k, a);
      multiply_step<Element, Config::kHeadDim, 1>(o, a, v + k * 16 * Tile::kRowBytes);
    }
  }

  /// The same of all keys of a tile where warps share them out.
  SM80_DEVICE void multiply_shared_p(uint32_t v_slot);

  /// What all warps of the rows need of this one's keys, seen by them after the next barrier.
  SM80_DEVICE void store_probabilities(const Scores& probabilities) const;

  // -- scores; `col` is the first column of a half

  SM80_DEVICE FragmentPlace place(int col) const {
    return {tile.m_begin + warp_row() + lane / 4, col + 2 * (lane % 4)};
  }

  /// Before S of a half is computed: what of attn_mask it will need.
  SM80_DEVICE void load_mask(int col) {
    if constexpr (kExtended) {
      if (p.mask.data == nullptr) return;
      const int row = tile.m_begin + warp_row();
      is_biased = __any_sync(
          ~0u, adds_values<Config::kWarpRows, kSubN>(p.mask, params.packed, tile.batch, tile.head, row, col));
      if (!is_biased) {
        mask_bits.load(params.packed, tile.batch, tile.head, row, col);
      } else {
        bias.load(p.mask, tile.batch, tile.head, place(col), int(tile.sequence.seqlen_q), tile.col_end,
                  params.mask_pairs);
      }
    }
  }

  SM80_DEVICE void apply_rules(Scores& scores, int col) {
    const FragmentPlace at = place(col);
    if constexpr (kExtended) {
      ScoreRules(p, tile.sequence, tile.batch, tile.head).apply(scores, at);
      if (p.mask.data != nullptr) {
        if (is_biased) {
          bias.add(scores, p.mask.dtype);
        } else {
          mask_bits.apply(scores);
        }
      }
    }
    if (col < full_begin() || col + kSubN > full_end()) {
      mask_columns(scores, at, ColumnBounds(p, tile.sequence));
    }
  }

  SM80_DEVICE void rescale(const Scores& scores) {
    typename Softmax::RowValues largest;
    softmax.find_largest(scores, largest);
    if constexpr (kWarpsD > 1) {
      combine_rows(largest, [](float x) { return quad_max(x); }, [](float x, float y) { return fmaxf(x, y); });
    }
    softmax.rescale(largest, [&](int m, int r, float factor) {
#pragma unroll
      for (int d = 0; d < kDTiles; ++d) o[m][d][2 * r] *= factor, o[m][d][2 * r + 1] *= factor;
    });
  }

  /// A number a row becomes that of all its keys: of the quad's lanes, and then of all warps that have the row.
  template <typename OfQuad, typename OfTwo>
  SM80_DEVICE void combine_rows(typename Softmax::RowValues& x, const OfQuad& of_quad, const OfTwo& of_two) const;

  // With attn_mask, a key that no row of the tile sees may have NaN in V, and 0 times that is NaN: its row of V becomes
  // 0.

  // Where `seen` has not told the loader, each warp tells what it sees.

  using SeenColumns = uint32_t[(kNTiles + 15) / 16];  // bit 2 (n % 16) + c: of column 8 n + 2 (lane % 4) + c

  SM80_DEVICE void find_seen_columns(const Scores& scores, SeenColumns& columns) const;

  /// All threads call it, between a barrier after V's arrival and the product; a barrier stands inside and at the end.
  SM80_DEVICE void clear_unseen_v(const SeenColumns& columns, int half, int phase, uint32_t v_slot);

  // -- the loop over tiles

  SM80_DEVICE void drop(Scores& scores, int col) const {
    if constexpr (kExtended) {
      if (p.dropout_p > 0.0) {
        apply_dropout(scores, make_dropout(p.rng_state, p.dropout_p), tile.batch * p.num_heads + tile.head, place(col));
      }
    }
  }

  /// O += P V of one half; `col` is its first column.
  template <int kHalf>
  SM80_DEVICE void multiply_half(Scores& scores, const SeenColumns& columns, int col, uint32_t v_slot) {
    if constexpr (kExtended) {
      if (p.mask.data != nullptr && !has_seen())
        clear_unseen_v(columns, kHalf, kHalves ? kHalf : col / kBlockN % 2, v_slot);
    }
    if constexpr (kWarpsD > 1) {
      multiply_shared_p(v_slot);
    } else {
      drop(scores, col);
      multiply_pv<kHalf>(scores, v_slot);
    }
  }

  /// On entry S of the tile's first half is computed; on exit, with kNext, that of the next tile.
  template <bool kNext>
  SM80_DEVICE void process_tile(int block, int next) {
    const int col = block * kBlockN;
    [[maybe_unused]] SeenColumns columns;
    apply_rules(s[0], col);
    if constexpr (kExtended) find_seen_columns(s[0], columns);
    rescale(s[0]);
    load_mask(col + kSubN);
    multiply_qk<1, true>(s[1], s[0]);
    wait_v();
    multiply_half<0>(s[0], columns, col, slot_after(k_slot, 1));

    apply_rules(s[1], col + kSubN);
    if constexpr (kExtended) find_seen_columns(s[1], columns);
    rescale(s[1]);
    if constexpr (kNext) {
      load_mask(next * kBlockN);
      wait_k();
      multiply_qk<0, true>(s[0], s[1]);
      multiply_half<1>(s[1], columns, col + kSubN, slot_before(k_slot));
    } else {
      take_exponentials(s[1]);
      multiply_half<1>(s[1], columns, col + kSubN, slot_after(k_slot, 1));
    }
  }

  /// The same where S of a whole tile is in registers: nothing overlaps inside a warp, but fragments of Q are read half
  /// as often.
  template <bool kNext>
  SM80_DEVICE void process_whole_tile(int block, int next) {
    const int col = block * kBlockN + warp_key();
    [[maybe_unused]] SeenColumns columns;
    apply_rules(s[0], col);
    if constexpr (kExtended) find_seen_columns(s[0], columns);
    rescale(s[0]);
    take_exponentials(s[0]);
    if constexpr (kWarpsD > 1) {
      drop(s[0], col);
      store_probabilities(s[0]);
    }
    wait_v();
    multiply_half<0>(s[0], columns, col, slot_after(k_slot, 1));
    if constexpr (kNext) {
      load_mask(next * kBlockN + warp_key());
      wait_k();
      multiply_qk<0, false>(s[0], s[0]);
    }
  }

  template <bool kNext>
  SM80_DEVICE void process(int block, int next) {
    if constexpr (kHalves) {
      process_tile<kNext>(block, next);
    } else {
      process_whole_tile<kNext>(block, next);
    }
  }

  SM80_DEVICE void run() {
    if constexpr (kExtended) {
      if (has_seen()) fill_seen();
    }
    int block = load_block = visited_block(tile.block_end - 1);
    load_q();  // arrives with the first tile
    if (block >= block_begin()) {
      load_mask(block * kBlockN + warp_key());
      begin_loads();
      load_next<true>(slots_begin());
      if constexpr (kSlots - kHeld == 2) load_next<false>(slots_begin() + Config::kSlotBytes);
      wait_tile();  // Q and the first K
      load_next<kSameAhead>(slots_begin() + (kSlots - kHeld) * Config::kSlotBytes);
      multiply_qk<0, false>(s[0], s[0]);
      for (int next = visited_block(block - 1); next >= block_begin(); next = visited_block(block - 1)) {
        process<true>(block, next);
        block = next;
      }
      process<false>(block, block);
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
