// Keys and values on their way to shared memory.
#pragma once

#include "config.h"
#include "tile.h"

namespace flash_attn::cuda::decode {

/// What those who use the keys know of the stages, in shared memory. Thread 0 writes; a barrier stands between.
struct Board {
  static constexpr int kStages = 6, kTiles = kStages + 1;  // no stage holds a block of a tile before the last kStages
  TileInfo* tiles;                                         // (kTiles)
  BlockInfo* blocks;                                       // (kStages)
  static constexpr int kBytes = kTiles * int(sizeof(TileInfo)) + kStages * int(sizeof(BlockInfo));
};

/// Runs ahead of the products: knows where the rows of the next block lie. A thread has row row_ + kRowStep * step of
/// each block.
template <typename C>
class Loader {
  using Element = typename C::Element;
  static constexpr int kPages = C::kRowStep < 16 ? C::kBlockN / 16 : C::kSteps;  // groups of 16 rows of this thread

 public:
  FLASH_ATTN_DEVICE Loader(const DecodeParams& params, const Board& board, const Unit& first, int end)
      : params_(params),
        board_(board),
        unit_(first),
        end_(end),
        row_(threadIdx.x / C::kGroup),
        chunk_(threadIdx.x % C::kGroup),
        to_(C::Tile::offset(row_, chunk_)) {
    if (more()) start_tile();
  }

  FLASH_ATTN_DEVICE bool more() const { return unit_.index < end_; }

  /// The next block into stage `number`, which begins at `stage`. The caller commits.
  FLASH_ATTN_DEVICE void load(int number, uint32_t stage) {
    const int block = (unit_.sequence.first_block + unit_.block) * C::kBlockN;
    if (block < whole_begin_ || block + C::kBlockN > tile_end_) {
      load_rows(stage + to_, block);
    } else if (pages_ == nullptr) {
      load_contiguous(stage + to_);
    } else {
      load_pages(stage + to_);
    }
    const bool begins = begins_, partial = block < full_begin_ || block + C::kBlockN > full_end_;
    const int first_key = block - unit_.sequence.k_row, slot = slot_;
    const bool ends = unit_.block + 1 == unit_.sequence.blocks || unit_.index + 1 == end_;
    if (threadIdx.x == 0) board_.blocks[number] = {first_key, slot, begins, ends, partial};
    begins_ = false;
    if (unit_.template advance<C>(params_, end_)) {
      if (++slot_ == Board::kTiles) slot_ = 0;
      start_tile();
    } else {
      k_ += params_.block_k, v_ += params_.block_v;
      find_pages();
    }
  }

 private:
  FLASH_ATTN_DEVICE void start_tile() {
    const ForwardParams& p = params_.problem;
    const TileInfo t = tile_info<C>(params_, unit_);
    if (threadIdx.x == 0) board_.tiles[slot_] = t;
    begins_ = true;
    const int first = unit_.sequence.k_row;
    tile_begin_ = t.begin + first, tile_end_ = t.end + first;
    full_begin_ = t.full_begin + first, full_end_ = t.full_end + first;
    whole_begin_ = params_.whole_rows ? tile_begin_ : tile_end_;
    const KeyRows rows = key_rows(p.cache, t.b);
    pages_ = rows.pages;
    // With pages k_ and v_ are at the head's first row of page 0, without at this thread's first row.
    const int64_t entry = pages_ == nullptr ? rows.entry : 0;
    const int64_t row = pages_ == nullptr ? (unit_.sequence.first_block + unit_.block) * C::kBlockN + row_ : 0;
    k_ = static_cast<const Element*>(p.k.data) + entry * p.k.batch + t.head_k * p.k.head + row * p.k.row + 8 * chunk_;
    v_ = static_cast<const Element*>(p.v.data) + entry * p.v.batch + t.head_k * p.v.head + row * p.v.row + 8 * chunk_;
    find_pages();
  }

  /// The pages of the next block, which are there when it is loaded.
  FLASH_ATTN_DEVICE void find_pages() {
    if (pages_ == nullptr || !params_.whole_rows) return;
    const int block = (unit_.sequence.first_block + unit_.block) * C::kBlockN;
#pragma unroll
    for (int i = 0; i < kPages; ++i) {
      const int row = block + (C::kRowStep < 16 ? 16 * i : row_ + C::kRowStep * i);
      if (row < tile_end_) page_[i] = pages_[params_.page.divide(row, in_page_[i])];
    }
  }

  /// The chunks of one row; `to` is the first's in the stage's keys.
  FLASH_ATTN_DEVICE void copy_row(uint32_t to, const Element* k, const Element* v) {
#pragma unroll
    for (int group = 0; group < C::kChunks; group += C::kGroup) {
      sm80::cp_async_16(to + group * 16, k + 8 * group);
      sm80::cp_async_16(to + group * 16 + C::kTileBytes, v + 8 * group);
    }
  }
  FLASH_ATTN_DEVICE void copy_row(uint32_t to, const Element* k, const Element* v, bool exists) {
#pragma unroll
    for (int group = 0; group < C::kChunks; group += C::kGroup) {
      const int column = 8 * (chunk_ + group);
      const bool k_there = exists && column < params_.problem.head_dim;
      const bool v_there = exists && column < params_.problem.head_dim_v;
      sm80::cp_async_16_or_zeros(to + group * 16, k_there ? k + 8 * group : params_.problem.k.data, k_there);
      sm80::cp_async_16_or_zeros(to + group * 16 + C::kTileBytes, v_there ? v + 8 * group : params_.problem.v.data,
                                 v_there);
    }
  }
  FLASH_ATTN_DEVICE void load_contiguous(uint32_t to) {
    const Element *k = k_, *v = v_;
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step, k += params_.step_k, v += params_.step_v) {
      copy_row(to + step * C::kRowStep * C::Tile::kRowBytes, k, v);
    }
  }

  FLASH_ATTN_DEVICE void load_pages(uint32_t to) {
    constexpr int kStepsOfPage = C::kSteps / kPages;
    const ForwardParams& p = params_.problem;
#pragma unroll
    for (int i = 0; i < kPages; ++i) {
      const int page = clamp(page_[i], 0, int(p.cache.entries) - 1);
      const int row = in_page_[i] + (C::kRowStep < 16 ? row_ : 0);
      const int64_t place = page * p.k.batch + row * p.k.row;
      const Element* k = k_ + place;
      const Element* v = v_ + (params_.same_strides ? place : page * p.v.batch + row * p.v.row);
#pragma unroll
      for (int s = 0; s < kStepsOfPage; ++s, k += params_.step_k, v += params_.step_v) {
        copy_row(to + (i * kStepsOfPage + s) * C::kRowStep * C::Tile::kRowBytes, k, v);
      }
    }
  }

  /// Each row by itself: some are not read, or pages are no multiple of 16 rows.
  FLASH_ATTN_DEVICE void load_rows(uint32_t to, int block) {
    const ForwardParams& p = params_.problem;
#pragma unroll 1
    for (int step = 0; step < C::kSteps; ++step) {
      const int row = block + row_ + step * C::kRowStep;
      const bool exists = row >= tile_begin_ && row < tile_end_;
      int page = 0, in_page = step * C::kRowStep;  // from the row that k_ and v_ are at
      if (pages_ != nullptr) {
        const int number = params_.page.divide(row, in_page);
        if (exists) page = clamp(pages_[number], 0, int(p.cache.entries) - 1);
      }
      copy_row(to + step * C::kRowStep * C::Tile::kRowBytes, k_ + page * p.k.batch + in_page * p.k.row,
               v_ + page * p.v.batch + in_page * p.v.row, exists);
    }
  }

  const DecodeParams& params_;
  const Board board_;
  Unit unit_;
  const int end_, row_, chunk_;
  const uint32_t to_;
  int tile_begin_ = 0, tile_end_ = 0;  // rows of the cache that some row of the tile sees
  int whole_begin_ = 0;                // of these, those that are copied a block at a time
  int full_begin_ = 0, full_end_ = 0;  // rows that all see
  int slot_ = 0;                       // of the tile, on the board
  bool begins_ = false;                // the next block is the tile's first
  const Element *k_ = nullptr, *v_ = nullptr;
  const int32_t* pages_ = nullptr;
  int page_[kPages] = {}, in_page_[kPages] = {};
};

}  // namespace flash_attn::cuda::decode
