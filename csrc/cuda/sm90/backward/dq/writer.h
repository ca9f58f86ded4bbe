// dq_accum, in which all tiles of a head add up dQ, is turned to dq when the last of them has added. A launch of its
// own for that takes an eighth of the whole at short sequences, because dq_accum comes from memory again. So a warp of
// each CTA, the dq writer, does it beside the products while L2 still holds it: a share for each tile that its CTA
// takes (schedule/shares.h), of a tile that lies so far back that all who add to the share are through.
//
// Flags in global memory say which tiles have added. benchmarks/experiments/040.
#pragma once

#include "../../hopper/stmatrix.h"
#include "../../hopper/tma.h"
#include "../single/config.h"

namespace flash_attn::cuda::sm90::backward {

// ---- flags: one for each tile, by number

/// By one thread that knows all dQ of the tile to be added.
FLASH_ATTN_DEVICE void say_added(const KernelParams& params, const Tile& tile) {
  if (params.dq_writing.enabled()) add_to_count(params.dq_writing.added + tile.number);
}

/// By a whole warp: until all have added to the share.
FLASH_ATTN_DEVICE void await_added(const KernelParams& params, const DqShare& share) {
  const int end = share.last_adding;
  for (int i = share.first_adding + threadIdx.x % 32; i <= end; i += 32) wait_for_count(params.dq_writing.added + i, 1);
  __syncwarp();
}

// ---- writer

/// Has few registers: what it works on lies in shared memory (DqShare), and goes through there in pieces.
template <typename Config>
struct Writer {
  using Element = typename Config::Element;
  static constexpr int kBlockM = Config::kBlockM;
  static constexpr int kPieces = kBlockM * Config::kPanels / kDqPieceRows;  // of a block

  const KernelParams& params;
  single::SharedStorage<Config>& shared;
  const uint32_t lane;  // unsigned, so that remainders of it keep no registers over the loop

  FLASH_ATTN_DEVICE void choose(int index) {
    TilePlace at;
    find_place(params, index, at);
    DqShare& share = shared.share;
    const bool by_last_block = params.dq_writing.by_last_block;
    share.first_adding = at.first;
    share.last_adding = by_last_block ? at.number() : at.first + at.count - 1;
    choose_share<Config>(params, at, by_last_block, share);
  }

  /// The share of the tile at `index` in the order of tiles, when all have added to it.
  FLASH_ATTN_DEVICE void begin_share(int index) {
    __syncwarp();
    if (lane == 0) choose(index);
    __syncwarp();
    await_added(params, shared.share);
  }

  // -- pieces: in as fragments of an accumulator (kDqTile), out as rows of 16-bit elements

  FLASH_ATTN_DEVICE void load_piece(int piece, uint32_t stage) {
    constexpr int kBytes = kDqPiece * sizeof(float);
    mbarrier_arrive_expect(&shared.piece_full[stage], kBytes);
    bulk_load(shared.dq_piece[stage], params.dq_accum + int64_t{piece} * kDqPiece, kBytes, &shared.piece_full[stage]);
  }

  FLASH_ATTN_DEVICE void convert_piece(uint32_t stage) {
    const uint32_t from = shared_address(shared.dq_piece[stage]) + lane * 16;
    const uint32_t row = shared_address(shared.dq_rows[stage]) + lane % 16 * 128;
#pragma unroll 1
    for (int j = 0; j < 16; ++j) {  // 16 rows of two, 8 columns each
      float x[4];
      load_shared(from + j * 512, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] *= params.softmax_scale;
      const int chunk = swizzled_chunk(j % 8, lane);
      stmatrix_x2(row + j / 8 * (16 * 128) + chunk * 16, pack<Element>(x[0], x[1]), pack<Element>(x[2], x[3]));
    }
    async_proxy_fence();  // the copy engine reads them
    __syncwarp();
  }

  FLASH_ATTN_DEVICE void store_piece(int piece, uint32_t stage) {
    constexpr bool kSideBySide = kBlockM == 64;  // a block's 64 x 64 tiles; else one below the other
    const int tile = piece % kPieces / 2 * 64, row = piece / kPieces * kBlockM + piece % 2 * kDqPieceRows;
    tma_store(&params.dq_rows, shared_address(shared.dq_rows[stage]),
              {kSideBySide ? tile : 0, shared.share.q_x + (kSideBySide ? row : row + tile), shared.share.q_y,
               shared.share.q_head, shared.share.q_batch});
    tma_store_commit();
  }

  /// The share's blocks of one head.
  FLASH_ATTN_DEVICE void write_head() {
    const DqShare& share = shared.share;
    int i = share.begin * kPieces;
    uint32_t count = share.pieces;
    if (lane == 0 && share.begin < share.end) {
      load_piece(share.first_block * kPieces + i, count % 2);
      load_piece(share.first_block * kPieces + i + 1, count % 2 ^ 1);
    }
#pragma unroll 1
    for (; i < share.end * kPieces; ++i, ++count) {
      const uint32_t stage = count % 2;
      mbarrier_wait(&shared.piece_full[stage], count / 2 % 2);
      if (lane == 0) tma_store_wait_read<1>();  // the last but one has left its buffer
      __syncwarp();
      convert_piece(stage);
      if (lane == 0) {
        store_piece(i, stage);
        if (i + 2 < share.end * kPieces) load_piece(share.first_block * kPieces + i + 2, stage);
      }
    }
  }

  FLASH_ATTN_DEVICE void write_share(int index) {
    begin_share(index);
    global_proxy_fence();
#pragma unroll 1
    for (int head = params.split.heads_of_tile; head > 0; --head) {
      write_head();
      __syncwarp();
      if (lane == 0) {
        ++shared.share.q_head;
        shared.share.pieces += (shared.share.end - shared.share.begin) * kPieces;
        shared.share.first_block += params.num_blocks;
      }
      __syncwarp();
    }
  }

  /// After the last tile the consumers write what is left, which takes a fraction of the time. All CTAs together have
  /// `lag` shares left.
  FLASH_ATTN_DEVICE void leave_rest_to_consumers() {
    const int num_tiles = count_tiles(params);
    uint32_t round = 0;
    for (int i = max(0, num_tiles - params.dq_writing.lag) + blockIdx.x; i < num_tiles; i += gridDim.x, ++round) {
      begin_share(i);
      if (lane == 0) mbarrier_arrive(&shared.share_full);
      mbarrier_wait(&shared.share_empty, round % 2);
    }
    __syncwarp();
    if (lane == 0) {
      shared.share.end = -1;
      mbarrier_arrive(&shared.share_full);
    }
  }

  FLASH_ATTN_DEVICE void run() {
    single::TileRing<Config> tiles;
    for (;; ++tiles.count) {
      mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
      const Tile& tile = shared.tiles[tiles.slot()];
      const bool ended = tile.num_heads < 0;
      const int index = tile.index;
      if (ended) break;
      mbarrier_arrive(&shared.tile_empty[tiles.slot()]);
      if (params.dq_writing.enabled() && index >= params.dq_writing.lag) write_share(index - params.dq_writing.lag);
    }
    if (params.dq_writing.enabled()) leave_rest_to_consumers();
    if (lane == 0) tma_store_wait();  // shared memory must outlive the stores
  }
};

}  // namespace flash_attn::cuda::sm90::backward
