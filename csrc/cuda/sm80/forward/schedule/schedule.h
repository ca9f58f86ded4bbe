// The order of the family's forward tiles. Host code, for planners.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../../common/tiles/groups.h"
#include "../../../common/tiles/sequence_blocks.h"
#include "../../../common/tiles/visibility.h"

namespace flash_attn::cuda::sm80 {

/// Without parts. Packed: num_m_blocks of all sequences together, and tiles head by head. `heads_per_group`: whose K
/// and V stay in L2 together, for causal problems.
inline TileSchedule make_schedule(const ForwardParams& p, int block_m, int64_t heads_per_group) {
  TileSchedule schedule{};
  const int64_t m_blocks = std::max<int64_t>(
      1, p.is_varlen_q() ? max_packed_blocks(p.total_q, p.batch, block_m) : ceil_div(p.seqlen_q, block_m));
  const int64_t heads = p.num_heads * (p.is_varlen_q() ? 1 : p.batch);
  schedule.num_m_blocks = Divisor(m_blocks);
  schedule.num_heads = Divisor(std::max<int64_t>(1, p.num_heads));
  schedule.queries_per_head = Divisor(std::max<int64_t>(1, p.group_size()));
  schedule.alike = p.is_dense();
  if (schedule.alike) schedule.sequence = sequence_info(p, 0);
  schedule.num_tiles = p.seqlen_q == 0 ? 0 : int(m_blocks * heads);
  schedule.order = p.is_varlen_q() ? TileSchedule::kPacked : TileSchedule::kRowsFirst;
  if (!p.is_varlen_q() && rows_see_prefixes(p) && heads > 0) {
    schedule.order = TileSchedule::kLongestFirst;
    set_groups(schedule, heads_per_group, heads);
  }
  schedule.num_splits = 1;
  schedule.split_begin = INT32_MAX;
  return schedule;
}

}  // namespace flash_attn::cuda::sm80
