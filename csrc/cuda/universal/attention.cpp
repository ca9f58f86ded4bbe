// The family's entries: nothing is refused; the dtype picks the instance.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "../../sequence.h"
#include "../mask/unpacked_mask.h"
#include "backward_launch.h"
#include "float32/choice.h"
#include "forward_launch.h"
#include "rows.h"
#include "universal.h"

namespace flash_attn::cuda::universal {
namespace {

template <typename Params>
const char* refuses(const Params&, const DeviceInfo&) {
  return nullptr;
}

/// The variant's name, by dtype and bucket.
const char* variant(DType dtype, int bucket) {
  static constexpr const char* kNames[4][3] = {{"simt fp64 d16", "simt fp64 d64", "simt fp64 d128"},
                                               {"simt fp32 d16", "simt fp32 d64", "simt fp32 d128"},
                                               {"simt bf16 d16", "simt bf16 d64", "simt bf16 d128"},
                                               {"simt fp16 d16", "simt fp16 d64", "simt fp16 d128"}};
  return kNames[int(dtype)][bucket == 16 ? 0 : bucket == 64 ? 1 : 2];
}

int block_size(DType dtype) { return dtype == DType::kFloat64 ? 32 : 64; }

#ifdef FLASH_ATTN_WITH_SM80

/// Whether the kernels of float32/ run the problem.
template <typename Params>
bool has_large_tiles(const Params& params, const DeviceInfo& device) {
  return device.compute_capability >= 80 && float32::takes(params) && float32::is_faster(params, device.num_sms);
}

#else

template <typename Params>
bool has_large_tiles(const Params&, const DeviceInfo&) {
  return false;
}

#endif

/// The name of such a kernel, whose blocks compute `columns`.
const char* large_tiles(const ForwardParams& p, int columns) {
  if (is_extended(p)) return columns == 64 ? "simt fp32 d64 8x8 extended" : "simt fp32 d128 8x8 extended";
  return columns == 64 ? "simt fp32 d64 8x8" : "simt fp32 d128 8x8";
}

Plan plan_forward(const ForwardParams& p, const DeviceInfo& device) {
  if (has_large_tiles(p, device)) {
    return {large_tiles(p, float32::block_columns(p)), float32::kForwardTile.queries, float32::kForwardTile.keys,
            mask::unpacked_bytes(p.mask)};
  }
  return {variant(p.dtype, forward_bucket(p)), block_size(p.dtype), block_size(p.dtype), mask::unpacked_bytes(p.mask)};
}

/// Where in the workspace of backward a mask is unpacked.
int64_t unpacked_mask_place(const BackwardParams& params) { return mask::aligned_part(RowWorkspace::bytes(params)); }

Plan plan_backward(const BackwardParams& params, const DeviceInfo& device) {
  const ForwardParams& p = params.forward;
  const int64_t mask = mask::unpacked_bytes(p.mask);
  if (has_large_tiles(params, device)) {
    Plan plan{large_tiles(p, float32::block_columns(params)), float32::kBackwardTile.queries,
              float32::kBackwardTile.keys, mask > 0 ? unpacked_mask_place(params) + mask : RowWorkspace::bytes(params)};
    const bool of_rows = p.deterministic || params.dslopes != nullptr;
    plan.decide("dq", of_rows ? variant(p.dtype, backward_bucket(p)) : "added to zeros");
    return plan;
  }
  return {variant(p.dtype, backward_bucket(p)), block_size(p.dtype), block_size(p.dtype),
          mask > 0 ? unpacked_mask_place(params) + mask : RowWorkspace::bytes(params)};
}

void forward(const ForwardParams& given, const DeviceInfo& device, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  ForwardParams p = given;
  p.mask = mask::unpack(p.mask, p.workspace, stream);
  const bool packed = p.is_varlen_q();
  if (packed || p.seqused_q != nullptr) {
    // Rows of no sequence: the kernel writes those that take part alone.
    fill_rows(p.out, p.dtype, packed ? 1 : p.batch, packed ? p.total_q : p.seqlen_q, p.num_heads, p.head_dim_v, stream);
    fill_lse(p, stream);
  }
  switch (p.dtype) {
    case DType::kFloat64: return launch_forward<double>(p, nullptr, stream);
    case DType::kFloat32: return launch_float32(p, nullptr, device, stream);
    case DType::kBFloat16: return launch_forward<__nv_bfloat16>(p, nullptr, stream);
    default: return launch_forward<__half>(p, nullptr, stream);
  }
}

template <typename T>
void launch_tiles(const BackwardParams& params, const DeviceInfo&, cudaStream_t stream) {
  launch_backward<T>(params, nullptr, stream);
}
template <>
void launch_tiles<float>(const BackwardParams& params, const DeviceInfo& device, cudaStream_t stream) {
  launch_float32(params, nullptr, device, stream);
}

template <typename T>
void launch(const BackwardParams& params, const DeviceInfo& device, cudaStream_t stream) {
  launch_tiles<T>(params, device, stream);
  if (params.dmask != nullptr) launch_mask_gradient<T>(params, nullptr, stream);
}

void backward(const BackwardParams& given, const DeviceInfo& device, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  BackwardParams params = given;
  const ForwardParams& p = params.forward;
  void* const place = static_cast<char*>(p.workspace) + unpacked_mask_place(given);
  params.forward.mask = mask::unpack(p.mask, place, stream);
  fill_gradients(params, stream);
  prepare_rows(params, nullptr, stream);
  switch (p.dtype) {
    case DType::kFloat64: launch<double>(params, device, stream); break;
    case DType::kFloat32: launch<float>(params, device, stream); break;
    case DType::kBFloat16: launch<__nv_bfloat16>(params, device, stream); break;
    default: launch<__half>(params, device, stream); break;
  }
  reduce_rows(params, stream);
}

}  // namespace

void launch_float32(const ForwardParams& p, const int* flags, const DeviceInfo& device, cudaStream_t stream) {
#ifdef FLASH_ATTN_WITH_SM80
  if (has_large_tiles(p, device)) return float32::forward(p, flags, stream);
#endif
  launch_forward<float>(p, flags, stream);
}

void launch_float32(const BackwardParams& params, const int* flags, const DeviceInfo& device, cudaStream_t stream) {
#ifdef FLASH_ATTN_WITH_SM80
  if (has_large_tiles(params, device)) return float32::backward(params, flags, stream);
#endif
  launch_backward<float>(params, flags, stream);
}

extern const ForwardKernel kForward = {"universal", refuses<ForwardParams>, plan_forward, forward};
extern const BackwardKernel kBackward = {"universal", refuses<BackwardParams>, plan_backward, backward};

}  // namespace flash_attn::cuda::universal
