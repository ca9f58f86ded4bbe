// Checks that the arguments of all ops share.
#pragma once

#include "../tensor_info.h"

namespace flash_attn {

/// Raises unless the tensor is on q's device; `of` is what q is called.
void check_device(const char* name, const TensorInfo& tensor, const TensorInfo& q, const char* of = "q");

/// Raises unless the tensor has one dimension of `size`, of that dtype, on q's device.
void check_vector(const char* name, const TensorInfo& tensor, DType dtype, int64_t size, const char* meaning,
                  const TensorInfo& q);

/// Raises unless the dtype is one that there are kernels for.
void check_dtype(const char* name, DType dtype);

/// Raises where torch's own operations in place would: the tensor was expanded, so that its elements share memory.
void check_written(const char* name, const TensorInfo& tensor);

}  // namespace flash_attn
