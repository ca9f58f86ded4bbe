#include "torch_tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "refuse.h"

namespace flash_attn {

namespace {

using torch::headeronly::ScalarType;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Bool: return DType::kBool;
    case ScalarType::Int: return DType::kInt32;
    case ScalarType::Long: return DType::kInt64;
    default: return DType::kOther;
  }
}

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return ScalarType::Double;
    case DType::kFloat32: return ScalarType::Float;
    case DType::kBFloat16: return ScalarType::BFloat16;
    case DType::kFloat16: return ScalarType::Half;
    case DType::kBool: return ScalarType::Bool;
    case DType::kInt32: return ScalarType::Int;
    case DType::kInt64: return ScalarType::Long;
    default: return ScalarType::Byte;
  }
}

/// As torch's C functions take it.
int32_t shim_dtype(DType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type(dtype)));
}

/// A new tensor. When memory runs out the text starts with "CUDA out of memory": Python raises torch.OutOfMemoryError.
Tensor empty_strided(int ndim, const int64_t* sizes, const int64_t* strides, DType dtype, const TensorInfo& like,
                     const char* name) {
  AtenTensorHandle handle = nullptr;
  const bool on_cpu = like.device == DeviceType::kCPU;
  const int32_t device = on_cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  if (aoti_torch_empty_strided(ndim, sizes, strides, shim_dtype(dtype), device, on_cpu ? 0 : like.device_index,
                               &handle) != 0) {
    double bytes = size_of(dtype);
    for (int i = 0; i < ndim; ++i) bytes *= double(sizes[i]);
    char text[200];
    std::snprintf(text, sizeof(text), "%s out of memory: flash_attn could not allocate %.1f MiB for %s",
                  on_cpu ? "CPU" : "CUDA", bytes / (1 << 20), name);
    throw std::runtime_error(text);
  }
  return Tensor(handle);
}

}  // namespace

TensorInfo info_of(const Tensor& tensor, const char* name) {
  TensorInfo info;
  info.ndim = int(tensor.dim());
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  check_ndim(name, info.ndim);
  for (int i = 0; i < info.ndim; ++i) {
    info.size[i] = sizes[i];
    info.stride[i] = strides[i];
  }
  info.data = tensor.data_ptr();
  info.dtype = dtype_of(tensor);
  if (tensor.is_cpu()) {
    info.device = DeviceType::kCPU;
  } else if (tensor.is_cuda()) {
    info.device = DeviceType::kCUDA;
    info.device_index = tensor.get_device_index();
  } else {
    refuse(name, " must be on the CPU or a CUDA device");
  }
  return info;
}

void make_unit_stride(Tensor& tensor, TensorInfo& info, const char* name) {
  const int last = info.ndim - 1;
  if (last < 0 || info.size[last] <= 1 || info.stride[last] == 1) return;
  tensor = torch::stable::contiguous(tensor);
  info = info_of(tensor, name);
}

Tensor converted(const Tensor& tensor, DType dtype) {
  return dtype_of(tensor) == dtype ? tensor : torch::stable::to(tensor, scalar_type(dtype));
}

Tensor empty_like_dense(const TensorInfo& like, int64_t last, const char* name) {
  int64_t sizes[TensorInfo::kMaxDims], strides[TensorInfo::kMaxDims];
  for (int i = 0; i < like.ndim; ++i) sizes[i] = like.size[i];
  sizes[like.ndim - 1] = last;
  dense_strides_like(like, last, strides);
  return empty_strided(like.ndim, sizes, strides, like.dtype, like, name);
}

Tensor empty_contiguous(int ndim, const int64_t* sizes, DType dtype, const TensorInfo& like, const char* name) {
  int64_t strides[TensorInfo::kMaxDims];
  int64_t next = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    strides[i] = next;
    next *= std::max<int64_t>(sizes[i], 1);
  }
  return empty_strided(ndim, sizes, strides, dtype, like, name);
}

}  // namespace flash_attn
