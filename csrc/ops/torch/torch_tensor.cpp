#include "torch_tensor.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "../../out_of_memory.h"
#include "../arguments/refuse.h"

namespace flash_attn {

namespace {

int32_t code_of(DType dtype) {
  if (dtype == kFloat8E4M3) return aoti_torch_dtype_float8_e4m3fn();
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

DType dtype_of(int32_t code) {
  constexpr int kCodes = 64;
  static const auto known = [] {
    std::array<DType, kCodes> dtypes;
    dtypes.fill(DType::kOther);
    for (int dtype = 0; dtype <= int(kFloat8E4M3); ++dtype) {
      const int32_t code = code_of(DType(dtype));
      if (DType(dtype) != DType::kOther && code >= 0 && code < kCodes) dtypes[size_t(code)] = DType(dtype);
    }
    return dtypes;
  }();
  return code >= 0 && code < kCodes ? known[size_t(code)] : DType::kOther;
}

/// Allocates what `info` describes, but for the data.
NewTensor allocated(TensorInfo info, const char* name) {
  AtenTensorHandle handle = nullptr;
  const bool on_cpu = info.device == DeviceType::kCPU;
  const int32_t device = on_cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  if (aoti_torch_empty_strided(info.ndim, info.size, info.stride, code_of(info.dtype), device,
                               on_cpu ? 0 : info.device_index, &handle) != 0) {
    double bytes = size_of(info.dtype);
    for (int i = 0; i < info.ndim; ++i) bytes *= double(info.size[i]);
    throw_out_of_memory(info.device, bytes, name);
  }
  NewTensor result{Tensor(handle), info};
  result.info.data = result.tensor.data();
  return result;
}

}  // namespace

TensorInfo info_of(const Tensor& tensor, const char* name) {
  const AtenTensorHandle handle = tensor.handle();
  int64_t ndim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0, device = 0;
  const void* data = nullptr;
  Tensor::check(aoti_torch_get_dim(handle, &ndim));
  check_ndim(name, ndim);
  Tensor::check(aoti_torch_get_sizes(handle, &sizes));
  Tensor::check(aoti_torch_get_strides(handle, &strides));
  Tensor::check(aoti_torch_get_dtype(handle, &dtype));
  Tensor::check(aoti_torch_get_device_type(handle, &device));
  // What came in is only read, so a copy-on-write tensor may stay one; what is written is our own.
  Tensor::check(torch_get_const_data_ptr(handle, &data));

  TensorInfo info;
  info.ndim = int(ndim);
  for (int i = 0; i < info.ndim; ++i) {
    info.size[i] = sizes[i];
    info.stride[i] = strides[i];
  }
  info.data = const_cast<void*>(data);
  info.dtype = dtype_of(dtype);
  if (device == aoti_torch_device_type_cpu()) {
    info.device = DeviceType::kCPU;
  } else if (device == aoti_torch_device_type_cuda()) {
    info.device = DeviceType::kCUDA;
    int32_t index = 0;
    Tensor::check(aoti_torch_get_device_index(handle, &index));
    info.device_index = index;
  } else {
    refuse(name, " must be on the CPU or a CUDA device");
  }
  return info;
}

void make_unit_stride(Tensor& tensor, TensorInfo& info, const char* name) {
  const int last = info.ndim - 1;
  if (last < 0 || info.size[last] <= 1 || info.stride[last] == 1) return;
  NewTensor copy = empty_like_dense(info, info.size[last], name);
  torch::stable::Tensor to = copy.tensor.shared();
  torch::stable::copy_(to, tensor.shared());
  tensor = std::move(copy.tensor);
  info = copy.info;
}

Tensor view_of(const Tensor& tensor, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
               int64_t offset) {
  AtenTensorHandle view = nullptr;
  Tensor::check(aoti_torch__reinterpret_tensor(tensor.handle(), int64_t(sizes.size()), sizes.begin(), strides.begin(),
                                               offset, &view));
  return Tensor(view);
}

Tensor laid_out_like(Tensor tensor, const Tensor& like) {
  const TensorInfo info = info_of(like, "a tensor to be laid out like");
  int64_t dense[TensorInfo::kMaxDims], next = 1;
  bool same = true;
  for (int i = info.ndim - 1; i >= 0; next *= info.size[i--]) {
    dense[i] = next;
    same = same && (info.size[i] == 1 || info.stride[i] == next);
  }
  int64_t ndim = 0;
  Tensor::check(aoti_torch_get_dim(tensor.handle(), &ndim));
  if (same && ndim == info.ndim) return tensor;  // of as many numbers: leading dimensions of 1 are all that differs
  AtenTensorHandle view = nullptr;
  Tensor::check(aoti_torch__reinterpret_tensor(tensor.handle(), info.ndim, info.size, dense, 0, &view));
  Tensor shaped(view);
  if (same) return shaped;
  torch::stable::Tensor result = torch::stable::empty_like(like.shared());
  torch::stable::copy_(result, shaped.shared());
  return Tensor(result);
}

Tensor converted(Tensor tensor, DType dtype, const char* name) {
  const TensorInfo info = info_of(tensor, name);
  if (info.dtype == dtype) return tensor;
  NewTensor result = empty_contiguous(info.ndim, info.size, dtype, info, name);
  torch::stable::Tensor to = result.tensor.shared();
  torch::stable::copy_(to, tensor.shared());
  return std::move(result.tensor);
}

NewTensor empty_like_dense(const TensorInfo& like, int64_t last, const char* name) {
  TensorInfo info = like;
  info.size[like.ndim - 1] = last;
  dense_strides_like(like, last, info.stride);
  return allocated(info, name);
}

NewTensor empty_contiguous(int ndim, const int64_t* sizes, DType dtype, const TensorInfo& like, const char* name) {
  TensorInfo info;
  info.dtype = dtype;
  info.device = like.device;
  info.device_index = like.device_index;
  info.ndim = ndim;
  int64_t next = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    info.size[i] = sizes[i];
    info.stride[i] = next;
    next *= std::max<int64_t>(sizes[i], 1);
  }
  return allocated(info, name);
}

}  // namespace flash_attn
