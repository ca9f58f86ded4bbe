// dq_accum, in which all tiles of a head add up dQ, is turned to dq when the last of them has added. A launch of its
// own for that takes an eighth of the whole at short sequences, because dq_accum comes from memory again. So a warp of
// each CTA, the dq writer, does it beside the products while L2 still holds it: a share for each tile that its CTA
// takes, of a tile that lies so far back that all who add to the share are through.
//
// A share is some query blocks of each of a tile's heads. Flags in global memory say which tiles have added. The writer
// waits for those of tiles that come earlier in the order of tiles, which have all been taken: so the waiting ends.
#pragma once

#include "backward_config.h"

namespace flash_attn::sm90 {

// ---- flags: one for each tile, counted head by head

/// By one thread that knows all dQ of the tile to be added.
template <typename Config>
SM90_DEVICE void say_added(const BackwardKernelParams& params, const BackwardTile& tile) {
  if (!params.dq_writing.enabled()) return;
  add_to_count(params.dq_writing.added + tile.batch_head * params.schedule.num_n_blocks +
               tile.n_begin / Config::kBlockN);
}

/// By a whole warp: until tiles [begin, end) have added.
SM90_DEVICE void await_added(const BackwardKernelParams& params, int begin, int end) {
  for (int i = begin + threadIdx.x % 32; i < end; i += 32) wait_for_count(params.dq_writing.added + i, 1);
  __syncwarp();
}

// ---- shares

/// The first query block whose last row sees the key block.
template <typename Config>
SM90_DEVICE int first_block_seeing(const BackwardKernelParams& params, int n_block) {
  const int diagonal = params.problem.causal == Causal::kTopLeft ? 0 : params.seqlen_k - params.seqlen_q;
  const int row = n_block * Config::kBlockN - diagonal - params.window_right;
  if (n_block == 0 || row <= 0) return 0;
  const bool none = n_block == params.schedule.num_n_blocks || row >= params.seqlen_q;
  return none ? params.num_m_blocks : row / Config::kBlockM;
}

/// A share begins where the one before ends: it has the query blocks to which no later tile of the head adds, or, where
/// all tiles add to all blocks, an equal part.
template <typename Config>
SM90_DEVICE int share_begin(const BackwardKernelParams& params, int n_block) {
  if (params.dq_writing.by_last_block) return first_block_seeing<Config>(params, n_block);
  return params.n_blocks.quotient(n_block * params.num_m_blocks);
}

template <typename Config>
SM90_DEVICE void choose_share(const BackwardKernelParams& params, const BackwardTilePlace& at, DqShare& share) {
  share.begin = share_begin<Config>(params, at.n_block);
  share.end = share_begin<Config>(params, at.n_block + 1);
  share.batch = params.heads_k.quotient(at.batch_head);
  share.q_head = (at.batch_head - share.batch * static_cast<int>(params.heads_k.divisor)) * params.group_size;
  share.first_block = share.q_head * params.num_blocks + share.batch * params.num_m_blocks;
}

/// By a whole warp: until all have added to the share of the tile at this place.
SM90_DEVICE void await_share(const BackwardKernelParams& params, const BackwardTilePlace& at) {
  const int first = at.batch_head * params.schedule.num_n_blocks;
  const int last = params.dq_writing.by_last_block ? at.n_block : params.schedule.num_n_blocks - 1;
  await_added(params, first, first + last + 1);
}

// ---- writer

/// Has few registers: what it works on lies in shared memory (DqShare), and goes through there in pieces.
template <typename Config>
struct DqWriter {
  using Element = typename Config::Element;
  static constexpr int kBlockM = Config::kBlockM;
  static constexpr int kPieces = kBlockM * Config::kPanels / kDqPieceRows;  // of a block

  const BackwardKernelParams& params;
  BackwardStorage<Config>& shared;
  const int lane;

  /// The share of the tile at `index` in the order of tiles, when all have added to it.
  SM90_DEVICE void begin_share(int index) {
    const BackwardTilePlace at = place_in_group(params, index);
    __syncwarp();
    if (lane == 0) choose_share<Config>(params, at, shared.share);
    await_share(params, at);
  }

  // -- pieces: in as fragments of an accumulator (kDqTile), out as rows of 16-bit elements

  SM90_DEVICE void load_piece(int piece, uint32_t stage) {
    constexpr int kBytes = kDqPiece * sizeof(float);
    mbarrier_arrive_expect(&shared.piece_full[stage], kBytes);
    bulk_load(shared.dq_piece[stage], params.dq_accum + int64_t{piece} * kDqPiece, kBytes, &shared.piece_full[stage]);
  }

  SM90_DEVICE void convert_piece(uint32_t stage) {
    const uint32_t from = shared_address(shared.dq_piece[stage]) + lane * 16;
    const uint32_t row = shared_address(shared.dq_rows[stage]) + lane % 16 * 128;
#pragma unroll 1
    for (int j = 0; j < 16; ++j) {  // 16 rows of two, 8 columns each
      float x[4];
      load_shared(from + j * 512, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] *= params.softmax_scale;
      const int chunk = j % 8 ^ lane % 8;  // 128-byte swizzle
      stmatrix_x2(row + j / 8 * (16 * 128) + chunk * 16, pack<Element>(x[0], x[1]), pack<Element>(x[2], x[3]));
    }
    async_proxy_fence();  // the copy engine reads them
    __syncwarp();
  }

  SM90_DEVICE void store_piece(int piece, uint32_t stage) {
    constexpr bool kSideBySide = kBlockM == 64;  // a block's 64 x 64 tiles; else one below the other
    const int tile = piece % kPieces / 2 * 64, row = piece / kPieces * kBlockM + piece % 2 * kDqPieceRows;
    tma_store(&params.dq_rows, shared_address(shared.dq_rows[stage]),
              {kSideBySide ? tile : 0, kSideBySide ? row : row + tile, params.seqlen_q, shared.share.q_head,
               shared.share.batch});
    tma_store_commit();
  }

  /// The share's blocks of one head.
  SM90_DEVICE void write_head() {
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

  SM90_DEVICE void write_share(int index) {
    begin_share(index);
    global_proxy_fence();
#pragma unroll 1
    for (int head = params.group_size; head > 0; --head) {
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
  SM90_DEVICE void leave_rest_to_consumers() {
    const int num_tiles = params.schedule.num_tiles;
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

  SM90_DEVICE void run() {
    BackwardTileRing<Config> tiles;
    for (;; ++tiles.count) {
      mbarrier_wait(&shared.tile_full[tiles.slot()], tiles.slot_phase());
      const BackwardTile& tile = shared.tiles[tiles.slot()];
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

}  // namespace flash_attn::sm90
