#include "tensor_map.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace flash_attn::cuda::sm90 {
namespace {

constexpr int64_t kMaxRows = int64_t{1} << 30;         // coordinates are 32-bit
constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;  // of a tensor map

decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return encoder;
}

bool holds(int64_t stride, int64_t size) {
  return size <= 1 || (stride >= 0 && stride * 2 % 16 == 0 && stride * 2 < kMaxStrideBytes);
}

}  // namespace

TensorMapSource query_rows(const ForwardParams& p, const TensorView& view, int64_t head_dim) {
  const bool packed = p.is_varlen_q();
  return {view, p.dtype, packed ? 1 : p.batch, packed ? p.total_q : p.seqlen_q, p.seqlen_q, p.num_heads, head_dim};
}

TensorMapSource key_rows(const ForwardParams& p, const TensorView& view, int64_t heads, int64_t head_dim) {
  const bool packed = p.is_varlen_k();
  return {view, p.dtype, packed ? 1 : p.batch, packed ? p.total_k : p.seqlen_k, p.seqlen_k, heads, head_dim};
}

const char* tensor_map_refuses(const TensorMapSource& s) {
  if (reinterpret_cast<uintptr_t>(s.view.data) % 16 != 0) return "a tensor does not start on 16 bytes";
  if (s.rows >= kMaxRows || s.heads >= kMaxRows || s.batch >= kMaxRows) return "a size is over 2^30";
  if (!holds(s.view.row, s.rows) || !holds(s.view.head, s.heads) || !holds(s.view.batch, s.batch)) {
    return "a stride is not a multiple of 16 bytes below 2^40";
  }
  return nullptr;
}

namespace {

/// All that a map is made of. No gaps between its members, which are compared as bytes.
struct Description {
  uintptr_t base;
  cuuint64_t sizes[5], strides[4];  // of dimensions; in bytes
  int64_t box_rows;
  DType dtype;
  int32_t zero = 0;

  bool operator==(const Description& other) const { return std::memcmp(this, &other, sizeof(*this)) == 0; }
};
static_assert(sizeof(Description) == 96);

CUtensorMap encode(const Description& d) {
  constexpr cuuint32_t kBoxColumns = 64;
  const cuuint32_t box[5] = {kBoxColumns, cuuint32_t(d.box_rows), 1, 1, 1};
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const auto type = d.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  CUtensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map, type, 5, reinterpret_cast<void*>(d.base), d.sizes, d.strides, box, element_strides,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with CUresult " + std::to_string(int(result)));
  }
  return map;
}

/// The map, encoded anew unless this thread has done so lately: calls come again with the same sizes, and with the
/// addresses that torch's allocator hands out in turn.
CUtensorMap map_of(const Description& d) {
  constexpr int kSlots = 64;  // some calls' worth
  struct Slot {
    CUtensorMap map;
    Description description;
  };
  static thread_local Slot slots[kSlots] = {};
  // Addresses are multiples of 512 bytes mostly; maps of one tensor differ by their boxes.
  const uint64_t mixed = (d.base / 512 + uint64_t(d.box_rows)) * 0x9e3779b97f4a7c15ull;
  Slot& slot = slots[mixed >> 58];
  static_assert(kSlots == 1 << (64 - 58));
  if (!(slot.description == d)) slot = {encode(d), d};
  return slot.map;
}

/// The stride of a dimension of one element is never used, but the encoder checks it.
cuuint64_t stride_bytes(int64_t stride, int64_t size) { return static_cast<cuuint64_t>(size > 1 ? 2 * stride : 16); }

}  // namespace

CUtensorMap make_tensor_map(const TensorMapSource& s, int box_rows) {
  const cuuint64_t row_bytes = stride_bytes(s.view.row, s.rows);
  return map_of({reinterpret_cast<uintptr_t>(s.view.data) - cuuint64_t(s.max_rows) * row_bytes,
                 {cuuint64_t(s.head_dim), cuuint64_t(s.max_rows), cuuint64_t(s.rows + 1), cuuint64_t(s.heads),
                  cuuint64_t(s.batch)},
                 {row_bytes, row_bytes, stride_bytes(s.view.head, s.heads), stride_bytes(s.view.batch, s.batch)},
                 box_rows,
                 s.dtype});
}

bool has_mask_map(const ForwardParams& p) {
  const MaskView& mask = p.mask;
  const auto whole = [](int64_t size, int64_t stride) { return size == 1 || stride % 8 == 0; };
  // A row that is broadcast is one of stride 0, as often as there are queries.
  const bool has_rows = mask.row_size == 1 ? p.seqlen_q > 1 : mask.row > 0 && mask.row % 8 == 0;
  return p.has_bias() && mask.dtype == p.dtype && has_rows && mask.col_size > 1 && mask.col == 1 &&
         reinterpret_cast<uintptr_t>(mask.data) % 16 == 0 && whole(mask.batch_size, mask.batch) &&
         whole(mask.head_size, mask.head) && mask.batch >= 0 && mask.head >= 0;
}

CUtensorMap make_mask_map(const MaskView& mask, int box_rows) {
  const bool broadcast = mask.row_size == 1;
  return map_of({reinterpret_cast<uintptr_t>(mask.data),
                 {cuuint64_t(mask.col_size), broadcast ? cuuint64_t(kMaxRows) : cuuint64_t(mask.row_size),
                  cuuint64_t(mask.head_size), cuuint64_t(mask.batch_size), 1},
                 {broadcast ? 0 : stride_bytes(mask.row, mask.row_size), stride_bytes(mask.head, mask.head_size),
                  stride_bytes(mask.batch, mask.batch_size), 16},
                 box_rows,
                 mask.dtype});
}

}  // namespace flash_attn::cuda::sm90
