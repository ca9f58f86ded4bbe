// Rows into a cache, and rotary embeddings.
#pragma once

#include "../row_copies.h"

namespace flash_attn::cuda {

void copy_rows(const RowCopies& copies, void* stream);

}  // namespace flash_attn::cuda
