// Beside its products a tile does what has to be done row by row, before (preprocess/prepared_rows.h) and after them
// (dq/writer.h), for a share of the query rows: some query blocks of each query head that reads its key head. Shares
// of a head's tiles make up all of its blocks.
#pragma once

#include "../../../common/ptx.h"
#include "../../../common/tiles/visibility.h"
#include "order.h"

namespace flash_attn::cuda::sm90::backward {

/// Of a tile; lives in shared memory.
struct QueryShare {
  int begin, end;   // query blocks
  int batch_head;   // of k, as Tile
  int q_head;       // the first of the heads
  int first_block;  // index of its block 0 in dq_accum and statistics
  int row;          // of packed sequences, where block 0 begins; else 0
  int seqlen_q;
  int q_x, q_y, q_batch;  // TMA coordinates of block 0
};

/// What the dq writer (dq/writer.h) is writing: q_head and first_block are of the head at which it is.
struct DqShare : QueryShare {     // end < 0: no more shares
  int first_adding, last_adding;  // numbers of the tiles that add to it
  uint32_t pieces;                // written before those of q_head
};

/// In which block a share of packed sequences begins. Queries and keys have the same lengths then (see
/// plan.cpp), so it has the rows beside the tile's keys; or, by_last_block, those to which no later tile of
/// the head adds.
template <typename Config>
FLASH_ATTN_DEVICE int packed_share_begin(const KernelParams& params, const TilePlace& at, int n_block, int seqlen,
                                         bool by_last_block) {
  const Band band{by_last_block ? params.window_right : 0, -kUnbounded, seqlen, seqlen};
  const int blocks = (min(seqlen, at.count * Config::kBlockN) + Config::kBlockM - 1) / Config::kBlockM;
  return n_block == at.count ? blocks : min(band.first_row(n_block * Config::kBlockN) / Config::kBlockM, blocks);
}

/// The first query block whose last row sees the key block.
template <typename Config>
FLASH_ATTN_DEVICE int first_block_seeing(const KernelParams& params, int n_block) {
  const int diagonal = params.problem.causal == Causal::kTopLeft ? 0 : params.seqlen_k - params.seqlen_q;
  Band band{diagonal + params.window_right, -kUnbounded, params.seqlen_k, params.seqlen_q};
  if constexpr (Config::kBand) band.right = params.condition.band().right;
  const int row = band.first_row(n_block * Config::kBlockN);
  if (n_block == 0) return 0;
  const bool none = n_block == params.schedule.num_n_blocks || row >= params.seqlen_q;
  return none ? params.num_m_blocks : row / Config::kBlockM;
}

/// A share begins where the one before ends: it has the query blocks to which no later tile of the head adds, or an
/// equal part.
template <typename Config>
FLASH_ATTN_DEVICE int share_begin(const KernelParams& params, int n_block, bool by_last_block) {
  if (by_last_block) return first_block_seeing<Config>(params, n_block);
  return params.n_blocks.divide(n_block * params.num_m_blocks);
}

/// The share of the tile at this place, to shared memory.
template <typename Config>
FLASH_ATTN_DEVICE void choose_share(const KernelParams& params, const TilePlace& at, bool by_last_block,
                                    QueryShare& share) {
  const int b = params.split.heads.divide(at.batch_head);
  share.batch_head = at.batch_head;
  share.q_head = (at.batch_head - b * static_cast<int>(params.split.heads.value)) * params.split.heads_of_tile;
  share.first_block = share.q_head * params.num_blocks;
  if (params.schedule.packed_blocks == nullptr) {
    share.begin = share_begin<Config>(params, at.n_block, by_last_block);
    share.end = share_begin<Config>(params, at.n_block + 1, by_last_block);
    share.first_block += b * params.num_m_blocks;
    share.row = share.q_x = 0;
    share.seqlen_q = share.q_y = params.seqlen_q;
    share.q_batch = b;
  } else {
    const SequenceInfo info = sequence_info(params.problem, b);
    const int row = static_cast<int>(info.q_row), seqlen = static_cast<int>(info.seqlen_q);
    share.begin = packed_share_begin<Config>(params, at, at.n_block, seqlen, by_last_block);
    share.end = packed_share_begin<Config>(params, at, at.n_block + 1, seqlen, by_last_block);
    share.first_block += static_cast<int>(first_block(params.problem, info, b, Config::kBlockM, 0));
    share.row = row;
    share.seqlen_q = seqlen;
    share.q_x = params.seqlen_q - seqlen;
    share.q_y = row + seqlen;
    share.q_batch = 0;
  }
}

/// Block i of a share, counted head by head: `head` from its first on.
struct BlockOfShare {
  int head, m_block;
};
FLASH_ATTN_DEVICE BlockOfShare block_of_share(const QueryShare& share, int i) {
  const int blocks = share.end - share.begin;
  const int head = static_cast<int>(__fdividef(i + 0.5f, blocks));  // exact for what a tile prepares
  return {head, share.begin + i - head * blocks};
}

}  // namespace flash_attn::cuda::sm90::backward
