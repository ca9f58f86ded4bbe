// Rows out of a cache.
#pragma once

#include "../row_copies.h"

namespace flash_attn::cuda {

void gather_keys(const KeyGather& gather, void* stream);

}  // namespace flash_attn::cuda
