// Tiles of a block's tensors, from global to shared memory.
#pragma once

#include "../copy_part.h"
#include "../tile_copy.h"
#include "schedule/walk.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
struct BackwardLoader : BackwardWalk<Config> {
  using Base = BackwardWalk<Config>;
  using Base::kQ, Base::kDo;
  using Base::lane, Base::full, Base::empty, Base::phase, Base::advance, Base::accum_block;
  using Base::params, Base::p, Base::tile, Base::shared, Base::head, Base::m_block, Base::step;
  using typename Base::Side;
  using Element = typename Config::Element;
  using Tile = SharedTile<Config::kHeadDim>;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kStages = Config::kStages;

  using Base::Base;

  SM80_DEVICE uint32_t loading_thread() const {
    return Config::kFewRegisters || Config::kBias ? fresh_thread(step) : threadIdx.x;
  }
  template <int kRows>
  SM80_DEVICE void load(uint32_t to, const TensorView& view, bool packed, int64_t sequence_row, int first, int begin,
                        int end, int of_head, int64_t columns) const {
    const Element* source =
        static_cast<const Element*>(view.data) + row_offset(view, packed, tile.batch, sequence_row + first, of_head);
    const auto exists = [=](int row) { return row >= begin - first && row < end - first; };
    load_tile<kRows, Config::kHeadDim, Config::kThreads, Config::kExtended>(
        loading_thread(), shared + to, source, view.row, int(columns), params.aligned,
        begin <= first && end - first >= kRows, exists);
  }

  SM80_DEVICE void load_keys() const {
    const bool packed = p.cu_seqlens_k != nullptr;
    const int first = tile.n_begin, end = first + tile.keys;
    load<kBlockN>(Config::kK, p.k, packed, tile.sequence.k_row, first, first, end, tile.head_k, p.head_dim);
    load<kBlockN>(Config::kV, p.v, packed, tile.sequence.k_row, first, first, end, tile.head_k, p.head_dim_v);
    if constexpr (Config::kMasks) {
      if (p.mask.data != nullptr) clear_bad_keys();
    }
  }

  /// 0 for what is not finite in K and V: a key that attn_mask hides from a query must not reach its dQ. Rows that do
  /// see such a key get NaN by their lse or delta.
  SM80_DEVICE void clear_bad_keys() const {
    constexpr uint32_t kExponent = std::is_same_v<Element, __half> ? 0x7c00 : 0x7f80;
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // K and V are there
    for (int i = int(threadIdx.x); i < 2 * Config::kKeyBytes / 4; i += Config::kThreads) {
      uint32_t x;
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(shared + Config::kK + 4 * i) : "memory");
      const bool low = (x & kExponent) == kExponent, high = (x >> 16 & kExponent) == kExponent;
      if (!low && !high) continue;
      x &= (low ? 0u : 0xffffu) | (high ? 0u : 0xffff0000u);
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared + Config::kK + 4 * i), "r"(x) : "memory");
    }
    __syncthreads();  // they are clean
  }

  /// 0 for query rows that see no key at all: what they hold, NaN perhaps, must not reach dK and dV. All warps find the
  /// same rows.
  SM80_DEVICE void clear_blind_queries(int stage) const {
    barrier_wait(full(kQ, stage), phase());
    barrier_wait(full(kDo, stage), phase());
    const uint32_t statistics = shared + Config::kLse + stage * Config::kStatisticBytes;
    const auto is_blind = [&](int row) {
      float x;
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(statistics + 4 * row));
      return x == -INFINITY;
    };
    bool any = false;
    for (int row = lane(); row < kBlockM; row += 32) any = any || is_blind(row);
    if (!__any_sync(~0u, any)) return;
    __syncthreads();  // all warps are at this step
    for (int i = int(fresh_thread(step)); i < 2 * kBlockM * Tile::kChunks; i += Config::kThreads) {
      const int row = i / Tile::kChunks % kBlockM, chunk = i % Tile::kChunks;
      if (!is_blind(row)) continue;
      const int tiles = i < kBlockM * Tile::kChunks ? Config::kQ : Config::kDo;
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(shared + tiles + stage * Config::kQueryBytes +
                                                                    Tile::offset(row, chunk)),
                   "r"(0)
                   : "memory");
    }
    __syncthreads();  // the rows are 0
  }

  /// A block of query rows to be loaded: what both of its tiles ask for.
  struct QueryBlock {
    int head, block;
    int first, last;  // of its rows, those that see some of the keys
    int64_t row;      // in the statistics
  };
  SM80_DEVICE QueryBlock query_block(int of_head, int block) const {
    const int row = block * kBlockM;
    return {of_head, block, tile.row_begin - row, tile.row_end - row, int64_t{accum_block(of_head, block)} * kBlockM};
  }

  using QueryCopy = TileCopy<kBlockM, Config::kHeadDim, Config::kThreads>;
  /// Of a thread's first piece of Q or dO, whose rows consist of 16-byte pieces.
  struct Piece {
    const char* from;
    uint32_t to;
  };
  SM80_DEVICE Piece query_piece(Side side, int of_head, int block, int stage) const {
    const QuerySteps& steps = side == kQ ? params.q : params.dout;
    const uint32_t thread = loading_thread(), row = uint32_t(QueryCopy::row(thread)),
                   chunk = uint32_t(QueryCopy::chunk(thread));
    return {(side == kQ ? tile.q : tile.dout) + uint64_t{uint32_t(of_head)} * steps.head +
                uint64_t{uint32_t(block)} * steps.block + (uint64_t{row} * steps.row + 16 * chunk),
            shared + (side == kQ ? Config::kQ : Config::kDo) + stage * Config::kQueryBytes + QueryCopy::offset(thread)};
  }
  SM80_DEVICE int64_t copy_step(Side side) const {
    return QueryCopy::kStep * (side == kQ ? params.q.row : params.dout.row);
  }

  SM80_DEVICE void copy_queries(Side side, const QueryBlock& of, int stage) const {
    const Piece piece = query_piece(side, of.head, of.block, stage);
    const int columns = int(side == kQ ? p.head_dim : p.head_dim_v), first = of.first, last = of.last;
    if ((first <= 0) & (last >= kBlockM) & (columns == Config::kHeadDim)) {
      QueryCopy::copy(piece.to, piece.from, copy_step(side));
    } else {
      const uint32_t thread = loading_thread();
      const int row = QueryCopy::row(thread), left = columns - 8 * QueryCopy::chunk(thread);
      QueryCopy::template copy_part<QueryCopy::kRowsAtOnce>(
          piece.to, piece.from, copy_step(side), left,
          [&](int further) { return row + further >= first && row + further < last; });
    }
  }

  /// Q and lse of a block of query rows, or dO and delta.
  SM80_DEVICE void load_queries(Side side, const QueryBlock& from, int stage) const {
    if constexpr (Config::kExtended) {
      load<kBlockM>((side == kQ ? Config::kQ : Config::kDo) + stage * Config::kQueryBytes,
                    side == kQ ? p.q : params.problem.dout, p.cu_seqlens_q != nullptr, tile.sequence.q_row,
                    from.block * kBlockM, tile.row_begin, tile.row_end, from.head,
                    side == kQ ? p.head_dim : p.head_dim_v);
    } else {
      copy_queries(side, from, stage);
    }
    copy_statistics(side, from, stage);
  }

  SM80_DEVICE void copy_statistics(Side side, const QueryBlock& from, int stage) const {
    if (threadIdx.x < kBlockM / 4) {
      cp_async_16(shared + (side == kQ ? Config::kLse : Config::kDelta) + stage * Config::kStatisticBytes +
                      16 * int(threadIdx.x),
                  (side == kQ ? params.minus_lse : params.minus_delta) + from.row + 4 * int(threadIdx.x));
    }
  }

  SM80_DEVICE void arrive_loaded(Side side, int stage) const {
    if constexpr (Config::kExtended) barrier_arrive(full(side, stage));  // what was not copied asynchronously is there
    // Of an address that is not known to be the same in all lanes ptxas makes a loop.
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (s == stage) barrier_arrive_after_copies(full(side, s));
    }
  }

  /// The next step's, into its stage as soon as all warps have left that.
  template <Side... kSides>
  SM80_DEVICE void load_next() const {
    int next_head = head, next_block = m_block;
    if (!advance(next_head, next_block)) return;
    const int stage = (step + 1) % kStages;
    const QueryBlock next = query_block(next_head, next_block);
    const auto load_side = [&](Side side) {
      if (step + 1 >= kStages && !(Config::kTogether && side == kQ)) {
        barrier_wait(empty(side, stage), uint32_t((step + 1) / kStages - 1) & 1);
      }
      load_queries(side, next, stage);
      if (!(Config::kTogether && side == kDo)) arrive_loaded(side, stage);
    };
    (load_side(kSides), ...);
  }

  // The same where both sides have one barrier, in two halves: the copies of whole tiles are issued among products, in
  // whose time their addresses are worked out.

  struct NextCopies {
    bool any;        // there is a next step
    uint32_t whole;  // 0: its copies have been issued
    int head, block;
    Piece piece[2];  // by sides
  };
  SM80_DEVICE NextCopies begin_next() const {
    NextCopies next{false, 0, head, m_block, {}};
    if (!advance(next.head, next.block)) return next;
    const int stage = (step + 1) % kStages;
    if (step + 1 >= kStages) barrier_wait(empty(kDo, stage), uint32_t((step + 1) / kStages - 1) & 1);
    const QueryBlock block = query_block(next.head, next.block);
    next.any = true;
    next.whole = (block.first <= 0) & (block.last >= kBlockM) & (int(p.head_dim) == Config::kHeadDim) &
                 (int(p.head_dim_v) == Config::kHeadDim);
    copy_statistics(kQ, block, stage);
    copy_statistics(kDo, block, stage);
    if (next.whole == 0) {
      copy_queries(kQ, block, stage);
      copy_queries(kDo, block, stage);
    }
    return next;
  }
  SM80_DEVICE void find_pieces(NextCopies& next) const {
    const int stage = (step + 1) % kStages;
    next.piece[kQ] = query_piece(kQ, next.head, next.block, stage);
    next.piece[kDo] = query_piece(kDo, next.head, next.block, stage);
  }
  /// Share `share` of `shares`.
  SM80_DEVICE void copy_share(const NextCopies& next, Side side, int share, int shares) const {
    constexpr int kGroups = Tile::kChunks / QueryCopy::kGroup, kCopies = kBlockM / QueryCopy::kStep * kGroups;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (i * shares / kCopies != share) continue;
      cp_async_16_if(
          next.piece[side].to + i / kGroups * QueryCopy::kStep * Tile::kRowBytes + i % kGroups * QueryCopy::kGroup * 16,
          next.piece[side].from + i / kGroups * copy_step(side) + i % kGroups * QueryCopy::kGroup * 16, next.whole);
    }
  }
  SM80_DEVICE void end_next(const NextCopies& next) const {
    if (next.any) arrive_loaded(kQ, (step + 1) % kStages);
  }
};

}  // namespace flash_attn::cuda::sm80
