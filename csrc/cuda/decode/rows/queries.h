// The queries of a lane's two rows, straight from memory, as the fragments that products read: those of sm80/mma.h,
// which a warpgroup's products share.
#pragma once

#include "../../sm80/softmax.h"
#include "../sharing/tile.h"

namespace flash_attn::cuda::decode {

/// The lane's two rows, as the scores know them.
struct LaneRows {
  int query[2];    // row of the sequence
  float slope[2];  // of ALiBi, times log2(e)
  float unit[2];   // of float8 caches: what products of the operands are multiples of
};

/// Where a packed row of a tile is in q.
template <typename C>
struct QueryRow {
  int query, head;  // of the sequence; of all
  bool exists;
  const typename C::Element* columns;  // of another row where it does not exist

  FLASH_ATTN_DEVICE QueryRow(const DecodeParams& params, const TileInfo& t, int row) {
    const ForwardParams& p = params.problem;
    int in_group;
    query = params.group.divide(t.first_row + row, in_group);
    head = t.head_k * int(params.group.value) + in_group;
    exists = row < t.rows && query < t.seqlen_q;
    const int64_t at = exists ? t.b * p.q.batch + (t.q_row + query) * p.q.row + head * p.q.head : 0;
    columns = static_cast<const typename C::Element*>(p.q.data) + at;
  }
};

/// Lane 4 g + t has rows g and g + 8 of its warp's 16, and of each 16 columns pairs 8 apart; where caches are float8,
/// four that follow each other (warps/float8.h).
template <typename C>
struct LaneQueries {
  static constexpr int kLaneColumns = C::kFloat8 ? 4 : 2, kPairStep = C::kFloat8 ? 2 : 8;
  const uint32_t* from[2];
  bool read[2];
  int columns;

  /// `first_row` is the lane's first row of the tile; also fills `rows` but for its units.
  FLASH_ATTN_DEVICE LaneQueries(const DecodeParams& params, const TileInfo& t, int first_row, LaneRows& rows)
      : columns(int(params.problem.head_dim)) {
    const ForwardParams& p = params.problem;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryRow<C> row(params, t, first_row + 8 * r);
      rows.query[r] = row.query;
      read[r] = row.exists;
      from[r] = reinterpret_cast<const uint32_t*>(row.columns + kLaneColumns * (threadIdx.x % 4));
      rows.slope[r] = 0.f;
      if (p.alibi_slopes != nullptr && read[r]) {
        const int64_t slope = t.b * p.alibi_batch_stride + row.head * p.alibi_head_stride;
        rows.slope[r] = sm80::kLog2E * static_cast<const float*>(p.alibi_slopes)[slope];
      }
    }
  }

  /// Columns 16 k to 16 k + 15; zeros beyond the last, and of rows that do not exist.
  FLASH_ATTN_DEVICE void fragment(int k, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i % 2, first = 16 * k + kPairStep * (i / 2);
      a[i] = read[r] && first < columns ? from[r][first / 2] : 0u;
    }
  }
};

}  // namespace flash_attn::cuda::decode
