// Host code, for planners: heads that are worked on together, see place_longest_first() of order.h.
#pragma once

#include "schedule.h"

namespace flash_attn::cuda {

/// `batch_heads`: of all sequences. num_m_blocks is set.
inline void set_groups(TileSchedule& schedule, int64_t heads_per_group, int64_t batch_heads) {
  const int64_t num_m_blocks = schedule.num_m_blocks.value;
  schedule.heads_per_group = Divisor(heads_per_group);
  schedule.group_tiles = Divisor(heads_per_group * (num_m_blocks - num_m_blocks / 4));
  schedule.batch_heads = Divisor(batch_heads);
}

}  // namespace flash_attn::cuda
