#include "rotary_arguments.h"

#include "checks.h"
#include "refuse.h"

namespace flash_attn {

Rotary make_rotary(const TensorInfo& cos, const std::optional<TensorInfo>& sin, bool interleaved, const TensorInfo& x) {
  if (!sin) refuse("sin must be given with cos, but is None");
  if (cos.ndim != 2 || sin->ndim != 2 || cos.size[0] != sin->size[0] || cos.size[1] != sin->size[1]) {
    refuse("cos and sin must be (positions, rotary_dim / 2), but have shapes ", shape_string(cos), " and ",
           shape_string(*sin));
  }
  const int64_t columns = x.size[x.ndim - 1];
  if (2 * cos.size[1] > columns) {
    refuse("cos and sin must have at most head_dim / 2 = ", columns / 2, " columns, but have ", cos.size[1]);
  }
  if (cos.dtype != sin->dtype || (cos.dtype != x.dtype && cos.dtype != DType::kFloat32)) {
    refuse("cos and sin must both be float32 or ", dtype_name(x.dtype), ", the dtype of what they turn, but are ",
           dtype_name(cos.dtype), " and ", dtype_name(sin->dtype));
  }
  check_device("cos", cos, x, "x");
  check_device("sin", *sin, x, "x");
  for (const TensorInfo* table : {&cos, &*sin}) {
    if (table->size[1] > 1 && table->stride[1] != 1) {
      refuse("cos and sin must have a last stride of 1, but have ", cos.stride[1], " and ", sin->stride[1]);
    }
  }
  Rotary rotary;
  if (cos.size[1] == 0) return rotary;
  rotary = {cos.data,    sin->data,   cos.dtype,   cos.stride[0], sin->stride[0],
            cos.size[0], cos.size[1], interleaved, false};
  return rotary;
}

RowCopies make_rotary_params(const RotaryArguments& a, bool read_values) {
  check_dtype("x", a.x.dtype);
  const bool packed = a.cu_seqlens.has_value();
  if (a.x.ndim != (packed ? 3 : 4)) {
    refuse("x must be ", packed ? "(total, heads, head_dim) with cu_seqlens" : "(batch, seqlen, heads, head_dim)",
           ", but has shape ", shape_string(a.x));
  }
  RowCopies p;
  p.dtype = a.x.dtype;
  p.batch = packed ? 1 : a.x.size[0];
  p.rows = a.x.size[packed ? 0 : 1];
  p.sequences = p.batch;
  if (packed) {
    if (a.cu_seqlens->ndim != 1 || a.cu_seqlens->size[0] < 1) {
      refuse("cu_seqlens must have shape (batch + 1), but has ", shape_string(*a.cu_seqlens));
    }
    p.sequences = a.cu_seqlens->size[0] - 1;
    check_vector("cu_seqlens", *a.cu_seqlens, DType::kInt32, p.sequences + 1, "batch + 1", a.x);
    p.cu_seqlens = static_cast<const int32_t*>(a.cu_seqlens->data);
  }
  if (a.offsets) {
    check_vector("offsets", *a.offsets, DType::kInt32, p.sequences, "batch", a.x);
    p.offsets = static_cast<const int32_t*>(a.offsets->data);
  }
  if (a.offset < 0) refuse("offset must be >= 0, but is ", a.offset);
  p.offset = a.offset;
  p.rotary = make_rotary(a.cos, a.sin, a.interleaved, a.x);
  p.rotary.conjugate = a.conjugate;
  if (a.cos.size[0] == 0 && p.rows > 0) refuse("cos and sin must have positions, but have none");
  if (!packed && !a.offsets && a.offset + p.rows > a.cos.size[0]) {
    refuse("cos and sin must have a position for each row of x, ", a.offset + p.rows, ", but have ", a.cos.size[0]);
  }
  const bool readable = read_values && a.x.device == DeviceType::kCPU && a.x.device_index != TensorInfo::kMeta;
  for (int64_t b = 0; readable && p.offsets != nullptr && b < p.sequences; ++b) {
    const int64_t rows = packed ? p.cu_seqlens[b + 1] - p.cu_seqlens[b] : p.rows;
    const int64_t first = a.offset + p.offsets[b];
    if (first < 0 || first + rows > a.cos.size[0]) {
      refuse("cos and sin must have a position for each row of x, but have ", a.cos.size[0], ", and sequence ", b,
             " begins at ", first, " with ", rows, " rows");
    }
  }
  const int head = packed ? 1 : 2;
  p.count = 1;
  p.copies[0].from = tensor_view(a.x, false);
  p.copies[0].heads = a.x.size[head];
  p.copies[0].columns = a.x.size[head + 1];
  p.copies[0].turned = p.rotary.exists();
  return p;
}

}  // namespace flash_attn
