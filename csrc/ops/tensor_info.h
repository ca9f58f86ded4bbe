// What the ops know of a tensor: dtype, place, sizes, strides. No torch, so that the op, the introspection module and
// plain C++ tests fill the same parameters.
#pragma once

#include <cstdint>
#include <string>

#include "../host_device.h"
#include "../tensor_view.h"

namespace flash_attn {

/// Of tensors that only ops on caches know; kernels get them as float8.h says.
constexpr DType kFloat8E4M3 = DType(int32_t(DType::kOther) + 1);

/// A tensor as it arrives from the caller. Strides count elements.
struct TensorInfo {
  static constexpr int kMaxDims = 4, kMeta = -2;
  void* data = nullptr;
  DType dtype = DType::kOther;
  DeviceType device = DeviceType::kCPU;
  int device_index = 0;  // kMeta, on the CPU: no data
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};
};

/// Raises unless that many dimensions can be described.
FLASH_ATTN_EXPORT void check_ndim(const char* name, int64_t ndim);

/// "(2, 8, 128, 64)"
std::string shape_string(const TensorInfo& tensor);
FLASH_ATTN_EXPORT const char* dtype_name(DType dtype);

/// Views of a tensor that has passed the checks.
FLASH_ATTN_EXPORT TensorView tensor_view(const TensorInfo& tensor, bool heads_first);
RowView row_view(const TensorInfo& tensor);

/// Strides of a dense tensor with the sizes of `like`, but `last` columns, whose dimensions lie in memory in the order
/// of `like`'s. The last one is always contiguous; those of stride 0, which have no place of their own, stay between
/// their neighbours, as with torch.empty_like.
FLASH_ATTN_EXPORT void dense_strides_like(const TensorInfo& like, int64_t last, int64_t* strides);

}  // namespace flash_attn
