#include "torch_tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../../out_of_memory.h"
#include "../arguments/refuse.h"

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
    case ScalarType::Float8_e4m3fn: return kFloat8E4M3;
    default: return DType::kOther;
  }
}

int32_t shim_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return aoti_torch_dtype_float64();
    case DType::kFloat32: return aoti_torch_dtype_float32();
    case DType::kBFloat16: return aoti_torch_dtype_bfloat16();
    case DType::kFloat16: return aoti_torch_dtype_float16();
    case DType::kBool: return aoti_torch_dtype_bool();
    case DType::kInt32: return aoti_torch_dtype_int32();
    case DType::kInt64: return aoti_torch_dtype_int64();
    default: return aoti_torch_dtype_uint8();
  }
}

Tensor empty_strided(int ndim, const int64_t* sizes, const int64_t* strides, DType dtype, const TensorInfo& like,
                     const char* name) {
  AtenTensorHandle handle = nullptr;
  const bool on_cpu = like.device == DeviceType::kCPU;
  const int32_t device = on_cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  if (aoti_torch_empty_strided(ndim, sizes, strides, shim_dtype(dtype), device, on_cpu ? 0 : like.device_index,
                               &handle) != 0) {
    double bytes = size_of(dtype);
    for (int i = 0; i < ndim; ++i) bytes *= double(sizes[i]);
    throw_out_of_memory(like.device, bytes, name);
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
  // What came in is only read, so a copy-on-write tensor may stay one; what is written is our own.
  info.data = const_cast<void*>(tensor.const_data_ptr());
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
  Tensor copy = empty_like_dense(info, info.size[last], name);
  torch::stable::copy_(copy, tensor);
  tensor = copy;
  info = info_of(tensor, name);
}

Tensor converted(const Tensor& tensor, DType dtype, const char* name) {
  const TensorInfo info = info_of(tensor, name);
  if (info.dtype == dtype) return tensor;
  Tensor result = empty_contiguous(info.ndim, info.size, dtype, info, name);
  torch::stable::copy_(result, tensor);
  return result;
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
