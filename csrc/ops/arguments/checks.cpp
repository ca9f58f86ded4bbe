#include "checks.h"

#include "refuse.h"

namespace flash_attn {

void check_device(const char* name, const TensorInfo& tensor, const TensorInfo& q, const char* of) {
  if (tensor.device != q.device || tensor.device_index != q.device_index) {
    const auto device = [](const TensorInfo& t) {
      if (t.device == DeviceType::kCPU) return std::string(t.device_index == TensorInfo::kMeta ? "meta" : "cpu");
      return "cuda:" + std::to_string(t.device_index);
    };
    refuse(name, " must be on ", of, "'s device ", device(q), ", but is on ", device(tensor));
  }
}

void check_vector(const char* name, const TensorInfo& tensor, DType dtype, int64_t size, const char* meaning,
                  const TensorInfo& q) {
  if (tensor.dtype != dtype) refuse(name, " must be ", dtype_name(dtype), ", but is ", dtype_name(tensor.dtype));
  if (tensor.ndim != 1 || tensor.size[0] != size) {
    refuse(name, " must have shape (", meaning, ") = (", size, ",), but has ", shape_string(tensor));
  }
  check_device(name, tensor, q);
}

void check_dtype(const char* name, DType dtype) {
  if (dtype != DType::kFloat64 && dtype != DType::kFloat32 && dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    refuse(name, " must be float64, float32, bfloat16 or float16, but is ", dtype_name(dtype));
  }
}

void check_written(const char* name, const TensorInfo& tensor) {
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.size[i] > 1 && tensor.stride[i] == 0) {
      refuse(name, " must have elements of its own, as it is written to, but was expanded in dimension ", i, ": give ",
             name, ".clone()");
    }
  }
}

}  // namespace flash_attn
