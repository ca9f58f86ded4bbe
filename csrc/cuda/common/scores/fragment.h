// The fragment of a matrix that a warp holds in registers, the same for mma.sync and for a warp of a wgmma warpgroup.
//
// Accumulator i of lane l is row l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2. Register j of an A
// operand of 16-bit elements holds two neighbouring columns: row l / 4 + 8 (j % 2), columns 2 (l % 4) + 8 (j / 2) and
// the next. So accumulators 8 k .. 8 k + 7, packed in pairs, are the A operand of k-step k.
#pragma once

#include "../ptx.h"

namespace flash_attn::cuda {

/// The four lanes of a quad hold the same two rows.
FLASH_ATTN_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace flash_attn::cuda
