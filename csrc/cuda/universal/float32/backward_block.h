// Backward in float32: what a block works on, and what it loads for it. See backward_kernel.h.
#pragma once

#include "../../common/tiles/sequence_blocks.h"
#include "../rows.h"
#include "extended.h"

namespace flash_attn::cuda::universal::float32 {
namespace {

struct BackwardArguments {
  BackwardParams params;
  RowWorkspace rows;
  SequenceBlocks blocks;
  int64_t first_block, group_size,
      num_parts;     // parts: of head_dim and head_dim_v
  const int* flags;  // see float32.h
  bool add_dq;
};

enum Phase { kScores, kOfValues, kOfProbabilities, kOfKeys, kOfQueries, kPhases };

enum Operand { kQ, kDout, kK, kV };  // of the first two query head 0

/// Rows [begin, end) of a block of `size` of which some of `range` are.
FLASH_ATTN_DEVICE RowRange rows_in_block(const Range& range, int begin, int size) {
  return {int(clamp<int64_t>(range.begin - begin, 0, size)), int(clamp<int64_t>(range.end - begin, 0, size))};
}

constexpr int kKeys = kGrid * kRows, kQueries = 64;  // of a tile

/// A tile: a query head and the first of its query rows.
struct Place {
  int head, m_begin;
};

/// What stays the same for a block, in shared memory, as registers are few.
struct BackwardBlock {
  SequenceInfo sequence;
  Rows operands[4];   // by Operand, of head 0
  int64_t first_row;  // in RowWorkspace, of head 0
  int batch, head_k, n_begin, keys;
  int part_column, phases;  // of the gradients; a bit each
  Range visible;            // queries
  int first_query, end_query, h_begin,
      h_end;  // of the tiles; no heads where nothing is visible

  FLASH_ATTN_DEVICE BackwardBlock(const BackwardArguments& a, const SequenceBlocks::PlaceOfHead& at, int part_column)
      : sequence(sequence_info(a.params.forward, at.batch)),
        batch(int(at.batch)),
        head_k(int(at.head)),
        n_begin(int(at.index) * kKeys),
        keys(int(clamp<int64_t>(sequence.seqlen_k - n_begin, 0, at.index < 0 ? 0 : kKeys))),
        part_column(part_column) {
    const ForwardParams& p = a.params.forward;
    const bool of_q = part_column < p.head_dim, of_v = part_column < p.head_dim_v;
    const bool want_dv = of_v && a.params.dv.data != nullptr, want_dk = of_q && a.params.dk.data != nullptr;
    const bool want_dq = of_q && a.add_dq;
    phases = 1 << kScores | int{want_dv} << kOfValues | int{want_dk || want_dq} << kOfProbabilities |
             int{want_dk} << kOfKeys | int{want_dq} << kOfQueries;
    if (keys == 0 || phases == 1 << kScores || (a.flags != nullptr && a.flags[batch * p.num_heads_k + head_k] == 0)) {
      keys = 0;
      return;
    }
    operands[kQ] = rows_of(p.q, batch, sequence.q_row, 0, p.head_dim);
    operands[kDout] = rows_of(a.params.dout, batch, sequence.q_row, 0, p.head_dim_v);
    operands[kK] = rows_of(p.k, batch, sequence.k_row, head_k, p.head_dim);
    operands[kV] = rows_of(p.v, batch, sequence.k_row, head_k, p.head_dim_v);
    first_row = p.cu_seqlens_q != nullptr ? sequence.q_row : batch * p.seqlen_q;
    visible = visible_rows(p, sequence, n_begin, n_begin + keys);
    first_query = int(visible.begin) / kQueries * kQueries, end_query = int(visible.end);
    h_begin = head_k * int(a.group_size);
    h_end = visible.empty() ? h_begin : h_begin + int(a.group_size);
  }

  FLASH_ATTN_DEVICE ScoreTile tile(const ForwardParams& p, int m_begin) const {
    return score_tile<kQueries, kKeys>(p, sequence, m_begin, n_begin);
  }
  FLASH_ATTN_DEVICE Place after(Place at) const {
    at.m_begin += kQueries;
    if (at.m_begin >= end_query) at.m_begin = first_query, ++at.head;
    return at;
  }
  /// The first tile from `at` on of which attn_mask leaves something.
  template <bool kExtended>
  FLASH_ATTN_DEVICE Place find_tile(const ForwardParams& p, Place at) const {
    if constexpr (kExtended) {
      if (p.mask.data == nullptr) return at;
      while (at.head < h_end && !is_seen<kQueries, kKeys>(p.mask, batch, at.head, tile(p, at.m_begin))) at = after(at);
    }
    return at;
  }

  FLASH_ATTN_DEVICE RowRange queries_of(int m_begin) const { return rows_in_block(visible, m_begin, kQueries); }
  /// Those that some query of the tile sees.
  FLASH_ATTN_DEVICE RowRange keys_of(const ForwardParams& p, int m_begin) const {
    const int64_t end = m_begin + kQueries < sequence.seqlen_q ? m_begin + kQueries : sequence.seqlen_q;
    return rows_in_block(visible_columns(p, sequence, m_begin, end), n_begin, keys);
  }
};

/// What a kernel knows beside q k^T: nothing; ALiBi and attn_mask; softcap and dropout too, for which a thread keeps a
/// number more of each score.
enum Rules { kNoRules, kMasks, kAllRules };

template <int kHeadDim_, Rules kRules_>
struct BackwardConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Rules kRules = kRules_;
  static constexpr bool kExtended = kRules != kNoRules;
  static constexpr int kCols = kQueries / kGrid, kOutCols = kHeadDim / kGrid;
  static constexpr int kWidth = 32;                  // columns of slabs that scores are products of
  static constexpr int kSlabRows = 4096 / kHeadDim;  // of the others, which have all columns
  // Rows of shared memory: of slabs transposed, and of P and dS, which are queries.
  static constexpr int kLd = kKeys + 4, kLdQueries = kQueries + 4;
  static constexpr int kStages = 2, kStageSize = kWidth * (kLd + kLdQueries);
  struct alignas(16) Statistics {
    float lse[kQueries], lost[kQueries], delta[kQueries];
  };
  struct Shared {
    alignas(16) float stages[kStages][kStageSize];
    alignas(16) float scores[kQueries * kLd];    // P, then dS
    Statistics statistics[2];                    // of tiles in turn
    Alive<kKeys> alive_keys[kExtended ? 2 : 1];  // likewise
    Alive<kQueries> alive_queries[kExtended ? 2 : 1];
    Kept<kRules == kAllRules ? kQueries : 1, kKeys> kept;
    alignas(BackwardBlock) unsigned char block[sizeof(BackwardBlock)];
  };
  static_assert(sizeof(Shared) <= 99 << 10);

  /// At least one.
  FLASH_ATTN_DEVICE static int slabs_of(const ForwardParams& p, const BackwardBlock& block, int phase, int m_begin) {
    switch (phase) {
      case kScores: return num_slabs(int(p.head_dim), kWidth);
      case kOfProbabilities: return num_slabs(int(p.head_dim_v), kWidth);
      case kOfQueries: return max(1, num_slabs(block.keys_of(p, m_begin).end, kSlabRows));
      default: return max(1, num_slabs(block.queries_of(m_begin).end, kSlabRows));
    }
  }
};

/// The slab that is to be loaded next.
template <typename C>
struct BackwardLoads {
  const BackwardArguments& arguments;
  const BackwardBlock& block;
  Place at;
  Place following;  // the tile after it, known in time
  int phase = kScores, turn = 0;
  int slab, slabs;  // of the phase
  RowRange rows;    // that are loaded of the tile's queries, or in the last phase of the block's keys

  FLASH_ATTN_DEVICE BackwardLoads(const BackwardArguments& arguments, const BackwardBlock& block, Place first)
      : arguments(arguments), block(block), at(first), following(first) {
    start_phase();
  }

  FLASH_ATTN_DEVICE void start_phase() {
    const ForwardParams& p = arguments.params.forward;
    slab = 0;
    slabs = C::slabs_of(p, block, phase, at.m_begin);
    rows = phase == kOfQueries ? block.keys_of(p, at.m_begin) : block.queries_of(at.m_begin);
  }

  FLASH_ATTN_DEVICE void load_rows(float* stage, const Rows& of_keys, const Rows& of_queries) const {
    load_transposed<kKeys, C::kWidth, C::kLd>(stage, of_keys, block.n_begin, slab * C::kWidth, {0, block.keys});
    load_transposed<kQueries, C::kWidth, C::kLdQueries>(stage + C::kWidth * C::kLd, of_queries, at.m_begin,
                                                        slab * C::kWidth, rows);
  }
  FLASH_ATTN_DEVICE void load_columns(float* stage, const Rows& from, int row) const {
    const int first = slab * C::kSlabRows;
    load_slab<C::kSlabRows, C::kHeadDim>(stage, from, row + first, block.part_column,
                                         {rows.begin - first, rows.end - first});
  }
  /// 0 for a query that takes no part.
  FLASH_ATTN_DEVICE void load_statistics(typename C::Statistics& to) const {
    const int i = int(threadIdx.x);
    if (i >= kQueries) return;
    const bool exists = at.m_begin + i < block.sequence.seqlen_q;
    const int64_t row = at.head * arguments.params.forward.total_q + block.first_row + (exists ? at.m_begin + i : 0);
    const auto load = [&](float& to, const void* from) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(&to)),
                   "l"(static_cast<const float*>(from) + row), "r"(exists ? 4 : 0)
                   : "memory");
    };
    load(to.lse[i], arguments.rows.lse);
    load(to.lost[i], arguments.rows.lost);
    load(to.delta[i], arguments.rows.delta);
  }

  FLASH_ATTN_DEVICE void issue(float* stage, typename C::Statistics (&statistics)[2]) {
    if (phase == kPhases) phase = kScores, turn ^= 1, at = following, start_phase();
    if (at.head >= block.h_end) return;
    const bool of_q = phase == kScores || phase == kOfKeys;
    Rows queries = block.operands[of_q ? kQ : kDout];
    queries.data += at.head * (of_q ? arguments.params.forward.q.head : arguments.params.dout.head);
    if (phase == kScores && slab == 0) load_statistics(statistics[turn]);
    switch (phase) {
      case kScores: load_rows(stage, block.operands[kK], queries); break;
      case kOfProbabilities: load_rows(stage, block.operands[kV], queries); break;
      case kOfQueries: load_columns(stage, block.operands[kK], block.n_begin); break;
      default: load_columns(stage, queries, at.m_begin); break;
    }
    if (++slab < slabs) return;
    while (++phase < kPhases && (block.phases >> phase & 1) == 0) {
    }
    if (phase < kPhases) start_phase();
  }
};

}  // namespace
}  // namespace flash_attn::cuda::universal::float32
