// Rows of tensors, for the kernels that work row by row.
#pragma once

#include "../../../sequence.h"
#include "../../common/ptx.h"

namespace flash_attn::cuda::sm90::backward {

FLASH_ATTN_DEVICE const uint16_t* row_pointer(const TensorView& view, int64_t b, int64_t row, int64_t head) {
  return static_cast<const uint16_t*>(view.data) + b * view.batch + row * view.row + head * view.head;
}

}  // namespace flash_attn::cuda::sm90::backward
