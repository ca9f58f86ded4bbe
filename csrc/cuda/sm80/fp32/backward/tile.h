// Which rows a block owns, and which others it has to do with.
#pragma once

#include "../../../common/tiles/visibility.h"
#include "../../mma.h"
#include "params.h"

namespace flash_attn::cuda::sm80::fp32 {

/// Rows of one side, keys or queries, of one head: pairs and their units.
struct PlaneRows {
  const __half* data;  // of the sequence's first row
  const float* units;  // of its tiles
};

/// Everything in rows of the tile's own sequence; "own" and "other" are keys and queries, or queries and keys.
struct BackwardTile {
  SequenceInfo sequence;
  int batch, kv_head;
  int head_begin, head_end;    // query heads
  int own_begin, own_rows;     // from where on, and how many from there on exist
  int other_begin, other_end;  // that have to do with some own row
  int full_begin, full_end;    // with all of them
  int block_begin, block_end;  // tiles of others
  int low, high;               // own row r has to do with others from r + low to r + high, below `others`
  int others;
  PlaneRows x, y;  // own rows: K and V, or Q and dO
};

SM80_DEVICE PlaneRows plane_rows(const Planes& planes, bool packed, int batch, int64_t first_row, int head) {
  return {planes.head_data(packed, batch, first_row, head), planes.head_units(packed, batch, first_row, head)};
}

/// From the sequence's first row on: a head's other rows, and what its query rows have.
struct OtherHead {
  PlaneRows x, y;  // Q and dO, or K and V
  const float *lse, *delta;
  float* dq;
};

template <bool kOfKeys>
SM80_DEVICE OtherHead find_other_head(const BackwardKernelParams& params, const BackwardTile& tile, int head) {
  const ForwardParams& p = params.problem.forward;
  const SequenceInfo& s = tile.sequence;
  const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = p.cu_seqlens_k != nullptr;
  const int64_t statistics = int64_t{head} * p.total_q + (packed_q ? s.q_row : tile.batch * p.seqlen_q);
  const TensorView& dq = params.problem.dq;
  OtherHead other;
  other.x = kOfKeys ? plane_rows(params.q, packed_q, tile.batch, s.q_row, head)
                    : plane_rows(params.k, packed_k, tile.batch, s.k_row, tile.kv_head);
  other.y = kOfKeys ? plane_rows(params.dout, packed_q, tile.batch, s.q_row, head)
                    : plane_rows(params.v, packed_k, tile.batch, s.k_row, tile.kv_head);
  other.lse = static_cast<const float*>(params.rows.lse) + statistics;
  other.delta = static_cast<const float*>(params.rows.delta) + statistics;
  other.dq = static_cast<float*>(dq.data) + (packed_q ? 0 : tile.batch * dq.batch) + head * dq.head + s.q_row * dq.row;
  return other;
}

/// A query row's number, of a head's, to shared memory; of a row that does not exist 0.
SM80_DEVICE void load_statistic(uint32_t to, const float* of_head, int row, int rows) {
  const bool exists = row < rows;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(of_head + (exists ? row : 0)),
               "r"(exists ? 4 : 0)
               : "memory");
}

/// Of the heads that tiles under way belong to, in shared memory: one that is worked on, two that are loaded after it.
struct OtherHeads {
  OtherHead of[4];
  SM80_DEVICE OtherHead& operator[](int head) { return of[head % 4]; }
};

template <bool kOfKeys>
SM80_DEVICE void find_bounds(const ForwardParams& p, int block_m, int block_n, BackwardTile& tile) {
  const SequenceInfo& s = tile.sequence;
  const int left = left_bound(p.window_left, s.diagonal), right = right_bound(p.window_right, s.diagonal);
  tile.low = kOfKeys ? -right : left;
  tile.high = kOfKeys ? -left : right;
  tile.others = int(kOfKeys ? s.seqlen_q : s.seqlen_k);
  const int last = tile.own_begin + min(block_m, tile.own_rows) - 1;
  tile.other_begin = clamp(tile.own_begin + tile.low, 0, tile.others);
  tile.other_end = clamp(last + tile.high + 1, tile.other_begin, tile.others);
  tile.full_begin = clamp(last + tile.low, 0, tile.others);
  tile.full_end = clamp(tile.own_begin + tile.high + 1, 0, tile.others);
  tile.block_begin = tile.other_begin / block_n;
  tile.block_end = (tile.other_end + block_n - 1) / block_n;
  if (tile.other_begin == tile.other_end) tile.block_end = tile.block_begin;
}

/// False: there is nothing to do.
template <typename Config>
SM80_DEVICE bool find_tile(const BackwardKernelParams& params, BackwardTile& tile) {
  constexpr bool kOfKeys = Config::kOfKeys;
  const ForwardParams& p = params.problem.forward;
  const int64_t heads = kOfKeys ? p.num_heads_k : p.num_heads;
  const auto [batch, head, block] =
      params.blocks.find_of_heads(params.first_block + blockIdx.x, heads, /*descending=*/!kOfKeys);
  if (block < 0) return false;
  tile.batch = int(batch);
  tile.kv_head = kOfKeys ? int(head) : int(head) / params.group_size;
  if (params.flags[batch * p.num_heads_k + tile.kv_head] != 0) return false;
  tile.head_begin = kOfKeys ? int(head) * params.group_size : int(head);
  tile.head_end = tile.head_begin + (kOfKeys ? params.group_size : 1);
  const SequenceInfo& s = tile.sequence = sequence_info(p, batch);
  tile.own_begin = int(block) * Config::kBlockM;
  tile.own_rows = int(kOfKeys ? s.seqlen_k : s.seqlen_q) - tile.own_begin;
  if (tile.own_rows <= 0) return false;  // rows of no sequence are filled by another kernel
  find_bounds<kOfKeys>(p, Config::kBlockM, Config::kBlockN, tile);
  const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = p.cu_seqlens_k != nullptr;
  if constexpr (kOfKeys) {
    tile.x = plane_rows(params.k, packed_k, tile.batch, s.k_row, tile.kv_head);
    tile.y = plane_rows(params.v, packed_k, tile.batch, s.k_row, tile.kv_head);
  } else {
    tile.x = plane_rows(params.q, packed_q, tile.batch, s.q_row, tile.head_begin);
    tile.y = plane_rows(params.dout, packed_q, tile.batch, s.q_row, tile.head_begin);
  }
  return true;
}

}  // namespace flash_attn::cuda::sm80::fp32
