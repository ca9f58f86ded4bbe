// Keys and values on their way to shared memory.
#pragma once

#include "../../sm80/mma.h"
#include "../sharing/tile.h"
#include "stages.h"

namespace flash_attn::cuda::decode {

/// What those who use the keys know of the stages, in shared memory. The warp that loads keys writes; the
/// stages' barriers stand between.
struct Board {
  static constexpr int kStages = StageBarriers::kStages;
  static constexpr int kTiles = kStages + 1;  // no stage holds a block of a tile before the last kStages
  TileInfo* tiles;                            // (kTiles)
  BlockInfo* blocks;                          // (kStages)
  static constexpr int kBytes = kTiles * int(sizeof(TileInfo)) + kStages * int(sizeof(BlockInfo));
};

/// A loading warp's, of keys or of values: knows where the rows of the next block lie. A lane has row row_ + kRowStep *
/// step of each block. Where values are a part of the keys, all warps load keys.
template <typename C>
class Loader {
  using Stored = typename C::Stored;
  static constexpr int kRuns = C::kBlockN / C::kRun;

 public:
  FLASH_ATTN_DEVICE Loader(const DecodeParams& params, const Board& board, const Unit& first, int end, int number)
      : params_(params),
        board_(board),
        unit_(first),
        end_(end),
        lane_(threadIdx.x % 32),
        number_(number),
        row_(number % C::kLoadersPerTile * C::kWarpRows + lane_ / C::kGroup),
        chunk_(lane_ % C::kGroup),
        values_(C::kValues && number >= C::kLoadersPerTile),
        columns_(int(values_ ? params.problem.head_dim_v : params.problem.head_dim)),
        to_(C::Tile::offset(row_, chunk_) + (values_ ? C::kTileBytes : 0)),
        stride_(values_ ? params.problem.v.row : params.problem.k.row),
        entry_stride_(values_ ? params.problem.v.batch : params.problem.k.batch) {
    start_tile();
  }

  FLASH_ATTN_DEVICE bool more() const { return unit_.index < end_; }

  /// Asks L2 for the first blocks of the tile that is begun, as many as there are stages, whoever has not written them
  /// yet: what is there when they are loaded counts. Without pages.
  FLASH_ATTN_DEVICE void prefetch_blocks() const {
    const int blocks = min(min(end_ - unit_.index, unit_.sequence.blocks - unit_.block), params_.stages);
    const int begin = (unit_.sequence.first_block + unit_.block) * C::kBlockN;
    const int rows = min(blocks * C::kBlockN, tile_end_ - begin);
    constexpr int kLine = 128 / int(sizeof(Stored)), kLines = (C::kHeadDim + kLine - 1) / kLine;
    for (int i = number_ % C::kLoadersPerTile * 32 + lane_; i < rows * kLines; i += 32 * C::kLoadersPerTile) {
      const int column = i % kLines * kLine;
      if (column < columns_) prefetch_to_l2(from_ + i / kLines * stride_ + column);
    }
  }

  /// The next block into stage `number`, which begins at `stage`.
  FLASH_ATTN_DEVICE void load(int number, uint32_t stage) {
    const int block = (unit_.sequence.first_block + unit_.block) * C::kBlockN;
    if (block < whole_begin_ || block + C::kBlockN > tile_end_) {
      load_rows(stage, block);
    } else {
      load_runs(stage);
    }
    const bool partial = block < full_begin_ || block + C::kBlockN > full_end_;
    const int first_key = block - unit_.sequence.k_row, slot = slot_;
    const bool last = unit_.index + 1 == end_, ends = last || unit_.block + 1 == unit_.sequence.blocks;
    if (speaks()) board_.blocks[number] = {first_key, slot, ends, last, partial};
    if (unit_.template advance<C>(params_, end_)) {
      if (++slot_ == Board::kTiles) slot_ = 0;
      start_tile();
    } else {
      if (pages_ == nullptr) from_ += C::kBlockN * stride_;
      find_pages();
    }
  }

  /// Whether this thread says what there is to say.
  FLASH_ATTN_DEVICE bool speaks() const { return lane_ == 0 && number_ == 0; }

 private:
  FLASH_ATTN_DEVICE void start_tile() {
    const ForwardParams& p = params_.problem;
    const TileInfo t = tile_info<C>(params_, unit_);
    if (speaks()) board_.tiles[slot_] = t;
    if (begun_ && number_ == C::kLoaders - 1) prefetch_queries(t);
    begun_ = true;
    const int first = unit_.sequence.k_row;
    tile_begin_ = t.begin + first, tile_end_ = t.end + first;
    full_begin_ = t.full_begin + first, full_end_ = t.full_end + first;
    whole_begin_ = params_.whole_rows ? tile_begin_ : tile_end_;
    const KeyRows rows = key_rows(p.cache, t.b);
    pages_ = rows.pages;
    // With pages at the head's first row of page 0, without at the block's first row.
    from_ = static_cast<const Stored*>(values_ ? p.v.data : p.k.data) + t.head_k * (values_ ? p.v.head : p.k.head);
    if (pages_ == nullptr) {
      const int row = (unit_.sequence.first_block + unit_.block) * C::kBlockN;
      from_ += rows.entry * entry_stride_ + row * stride_;
    }
    find_pages();
  }

  /// To L2: they are read when the tile's first keys are there.
  FLASH_ATTN_DEVICE void prefetch_queries(const TileInfo& t) const {
    const ForwardParams& p = params_.problem;
    constexpr int kLines = (C::kHeadDim * 2 + 127) / 128;
#pragma unroll 1
    for (int i = lane_; i < t.rows * kLines; i += 32) {
      int in_group;
      const int query = params_.group.divide(t.first_row + i / kLines, in_group), column = i % kLines * 64;
      if (query >= t.seqlen_q || column >= p.head_dim) continue;
      const int head = t.head_k * int(params_.group.value) + in_group;
      const int64_t at = t.b * p.q.batch + (t.q_row + query) * p.q.row + head * p.q.head + column;
      prefetch_to_l2(static_cast<const typename C::Element*>(p.q.data) + at);
    }
  }

  /// The page of each run of the next block, lane i's of run i, which is there when the block is loaded.
  FLASH_ATTN_DEVICE void find_pages() {
    if (pages_ == nullptr || !params_.whole_rows || lane_ >= kRuns) return;
    const int row = (unit_.sequence.first_block + unit_.block) * C::kBlockN + lane_ * C::kRun;
    if (row < tile_end_) page_ = pages_[params_.page.divide(row, in_page_)];
  }

  /// Where this lane's chunk of row row_ + `row` is in a stage; `row` is a multiple of kRowStep.
  FLASH_ATTN_DEVICE uint32_t place(uint32_t stage, int row) const {
    constexpr bool kWholeLines = C::Tile::kWholeLines;
    return stage + uint32_t(row * C::Tile::kPitch) + (to_ ^ uint32_t((kWholeLines ? row & 7 : row >> 1 & 3) << 4));
  }

  /// All rows of a block, each run of them from one place.
  FLASH_ATTN_DEVICE void load_runs(uint32_t stage) {
    const int64_t lane_offset = row_ * stride_ + C::kChunkColumns * chunk_, step = C::kRowStep * stride_;
#pragma unroll 1
    for (int i = 0; i < kRuns; ++i) {
      const Stored* from = from_ + lane_offset;
      if (pages_ != nullptr) {
        const int page = clamp(__shfl_sync(~0u, page_, i), 0, int(params_.problem.cache.entries) - 1);
        from += page * entry_stride_ + __shfl_sync(~0u, in_page_, i) * stride_;
      } else {
        from += i * C::kRun * stride_;
      }
      const uint32_t to = stage + i * C::kRun * C::Tile::kPitch;
#pragma unroll
      for (int row = 0; row < C::kRun; row += C::kRowStep, from += step) {
#pragma unroll
        for (int group = 0; group < C::kChunks; group += C::kGroup) {
          sm80::cp_async_16(C::Tile::further(place(to, row), group), from + C::kChunkColumns * group);
        }
      }
    }
  }

  /// Each row by itself: some are not read, or pages are no multiple of a run.
  FLASH_ATTN_DEVICE void load_rows(uint32_t stage, int block) {
#pragma unroll 1
    for (int step = 0; step < C::kBlockN; step += C::kRowStep) {
      const int row = block + row_ + step;
      const bool exists = row >= tile_begin_ && row < tile_end_;
      int page = 0, in_page = row_ + step;  // from the row that from_ is at
      if (pages_ != nullptr) {
        const int number = params_.page.divide(row, in_page);
        if (exists) page = clamp(pages_[number], 0, int(params_.problem.cache.entries) - 1);
      }
      const Stored* const from = from_ + (page * entry_stride_ + in_page * stride_ + C::kChunkColumns * chunk_);
#pragma unroll
      for (int group = 0; group < C::kChunks; group += C::kGroup) {
        const bool there = exists && C::kChunkColumns * (chunk_ + group) < columns_;
        const void* const chunk = there ? from + C::kChunkColumns * group : params_.problem.k.data;
        sm80::cp_async_16_or_zeros(C::Tile::further(place(stage, step), group), chunk, there);
      }
    }
  }

  const DecodeParams& params_;
  const Board board_;
  Unit unit_;
  const int end_, lane_, number_, row_, chunk_;  // number_: which of the loading warps
  const bool values_;
  const int columns_;
  const uint32_t to_;
  const int64_t stride_, entry_stride_;  // elements
  int tile_begin_ = 0, tile_end_ = 0;    // rows of the cache that some row of the tile sees
  int whole_begin_ = 0;                  // of these, those that are copied a block at a time
  int full_begin_ = 0, full_end_ = 0;    // rows that all see
  int slot_ = 0;                         // of the tile, on the board
  bool begun_ = false;                   // there was a tile
  const Stored* from_ = nullptr;
  const int32_t* pages_ = nullptr;
  int page_ = 0, in_page_ = 0;
};

}  // namespace flash_attn::cuda::decode
