// A packed boolean mask as bytes again, for kernels that work on scores one by one.
#pragma once

#include <cuda_runtime_api.h>

#include "../../packed_mask.h"

namespace flash_attn::cuda::mask {

using namespace flash_attn::mask;

/// Bytes that it takes; none unless the mask is boolean and was packed before.
inline int64_t unpacked_bytes(const MaskView& view) {
  if (view.packed == nullptr || view.dtype != DType::kBool) return 0;
  return view.batch_size * view.head_size * view.row_size * view.col_size;
}

/// The mask to read: unpacked into `data`, unpacked_bytes(view) of them, or as it is where that is none.
MaskView unpack(const MaskView& view, void* data, cudaStream_t stream);

}  // namespace flash_attn::cuda::mask
