// Between torch's tensors and TensorInfo: description, copies with rows that kernels can read, new tensors.
#pragma once

#include <initializer_list>

#include "../tensor_info.h"
#include "tensor.h"

namespace flash_attn {

/// `name` is the argument's, for refusals.
TensorInfo info_of(const Tensor& tensor, const char* name);

/// Kernels read rows: a tensor whose last dimension is not contiguous is replaced by a copy, and described anew.
void make_unit_stride(Tensor& tensor, TensorInfo& info, const char* name);

/// A new tensor, and what info_of() would say of it.
struct NewTensor {
  Tensor tensor;
  TensorInfo info;
};

/// Of the tensor's memory, from its number `offset` on.
Tensor view_of(const Tensor& tensor, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
               int64_t offset = 0);

/// A contiguous tensor of as many numbers in the shape and memory order of `like`, as torch.empty_like has them. The
/// tensor itself where it has both.
Tensor laid_out_like(Tensor tensor, const Tensor& like);

/// Contiguous. The tensor itself where it has that dtype.
Tensor converted(Tensor tensor, DType dtype, const char* name);

/// Uninitialised, on the device of `like`, with its sizes but `last` columns, dense, in its memory order. Throws when
/// memory runs out, with what `name` says was to be stored.
NewTensor empty_like_dense(const TensorInfo& like, int64_t last, const char* name);

/// Uninitialised, on the device of `like`, contiguous.
NewTensor empty_contiguous(int ndim, const int64_t* sizes, DType dtype, const TensorInfo& like, const char* name);

}  // namespace flash_attn
