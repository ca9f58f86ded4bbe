// The CPU family.
#pragma once

#include "../kernel.h"
#include "../row_copies.h"

namespace flash_attn::cpu {

extern const ForwardKernel kForward;
extern const BackwardKernel kBackward;
/// See Backend::pack_mask.
void pack_mask(const MaskView& mask, void* data, void* stream);

void copy_rows(const RowCopies& copies, void* stream);

}  // namespace flash_attn::cpu
