// The CPU family.
#pragma once

#include "../kernel.h"
#include "../row_copies.h"

namespace flash_attn::cpu {

extern const ForwardKernel kForward;
extern const BackwardKernel kBackward;

void copy_rows(const RowCopies& copies, void* stream);

}  // namespace flash_attn::cpu
