// Where rows of tiles lie in shared memory.
#pragma once

#include "ptx.h"

namespace flash_attn::cuda {

/// In the 128-byte swizzle a row of 128 bytes is eight chunks of 16, and chunk c of row r stands at c ^ (r % 8): eight
/// rows' chunks c lie in different banks. Tiles start on a multiple of 1024 bytes.
FLASH_ATTN_DEVICE int swizzled_chunk(int chunk, uint32_t row) { return chunk ^ (row % 8); }

}  // namespace flash_attn::cuda
