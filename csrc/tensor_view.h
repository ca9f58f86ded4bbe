// A tensor as kernels see it: where its data are, and strides.
#pragma once

#include <cstdint>

namespace flash_attn {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16, kBool, kInt32, kInt64, kOther };

constexpr int size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    default: return 1;
  }
}

enum class DeviceType : int32_t { kCPU, kCUDA };

/// (batch, seqlen, heads, head_dim), head_dim contiguous. With cu_seqlens the tensor is (total, heads, head_dim) and
/// `batch` is 0: sequence b starts at row cu_seqlens[b] (see SequenceInfo).
struct TensorView {
  void* data = nullptr;
  int64_t batch = 0, row = 0, head = 0;  // strides in elements
};

/// One number a (batch, head, query row): lse and its gradient. With cu_seqlens (heads, total_q) and `batch` is 0.
struct RowView {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

}  // namespace flash_attn
