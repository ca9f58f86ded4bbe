#include "tensor_info.h"

#include <algorithm>
#include <sstream>
#include <utility>

#include "arguments/refuse.h"

namespace flash_attn {

void check_ndim(const char* name, int64_t ndim) {
  if (ndim > TensorInfo::kMaxDims) refuse(name, " must have at most 4 dimensions, but has ", ndim);
}

std::string shape_string(const TensorInfo& tensor) {
  std::ostringstream text;
  text << "(";
  for (int i = 0; i < tensor.ndim; ++i) text << (i ? ", " : "") << tensor.size[i];
  text << (tensor.ndim == 1 ? ",)" : ")");
  return text.str();
}

const char* dtype_name(DType dtype) {
  if (dtype == kFloat8E4M3) return "float8_e4m3fn";
  switch (dtype) {
    case DType::kFloat64: return "float64";
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kBool: return "bool";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    default: return "another dtype";
  }
}

TensorView tensor_view(const TensorInfo& tensor, bool heads_first) {
  if (tensor.ndim == 3) return {tensor.data, 0, tensor.stride[0], tensor.stride[1]};
  const int row = heads_first ? 2 : 1, head = heads_first ? 1 : 2;
  return {tensor.data, tensor.stride[0], tensor.stride[row], tensor.stride[head]};
}

RowView row_view(const TensorInfo& tensor) {
  if (tensor.ndim == 2) return {tensor.data, 0, tensor.stride[0], tensor.stride[1]};
  return {tensor.data, tensor.stride[0], tensor.stride[1], tensor.stride[2]};
}

void dense_strides_like(const TensorInfo& like, int64_t last, int64_t* strides) {
  int order[TensorInfo::kMaxDims];  // innermost first
  const int outer = like.ndim - 1;
  for (int i = 0; i < outer; ++i) order[i] = outer - 1 - i;
  for (int i = 1; i < outer; ++i) {
    for (int own = i, j = i - 1; j >= 0; --j) {
      const int64_t inner = like.stride[order[j]], stride = like.stride[order[own]];
      if (inner == 0 || stride == 0) continue;
      if (inner <= stride) break;
      std::swap(order[j], order[own]);
      own = j;
    }
  }
  strides[outer] = 1;
  int64_t next = std::max<int64_t>(last, 1);
  for (int i = 0; i < outer; ++i) {
    strides[order[i]] = next;
    next *= std::max<int64_t>(like.size[order[i]], 1);
  }
}

}  // namespace flash_attn
