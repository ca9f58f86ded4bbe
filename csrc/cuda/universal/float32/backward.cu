#include "../backward_launch.h"
#include "backward_kernel.h"
#include "float32.h"

namespace flash_attn::cuda::universal::float32 {
bool takes(const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  const auto fits = [](const TensorView& gradient, int64_t columns) {
    return gradient.data == nullptr || has_whole_chunks(gradient, columns);
  };
  return p.dtype == DType::kFloat32 && reads_mask(p.mask) && backward_bucket(p) > 16 && p.head_dim > 0 &&
         p.head_dim_v > 0 && counts_fit(p) && has_whole_chunks(p.q, p.head_dim) && has_whole_chunks(p.k, p.head_dim) &&
         has_whole_chunks(p.v, p.head_dim_v) && has_whole_chunks(params.dout, p.head_dim_v) &&
         fits(params.dq, p.head_dim) && fits(params.dk, p.head_dim) && fits(params.dv, p.head_dim_v);
}

void backward(const BackwardParams& params, const int* flags, cudaStream_t stream) {
  if (!takes(params)) return universal::launch_backward<float>(params, flags, stream);
  const ForwardParams& p = params.forward;
  // The gradient of slopes is a sum over rows, and a fixed order is that of one owner.
  const bool of_rows = params.dslopes != nullptr || (params.dq.data != nullptr && p.deterministic);
  const bool add_dq = params.dq.data != nullptr && !of_rows;
  if (add_dq || params.dk.data != nullptr || params.dv.data != nullptr) {
    const bool narrow = block_columns(params) == 64;
    auto* const launch = is_extended(p)
                             ? (narrow ? launch_backward_kernel<64, kAllRules> : launch_backward_kernel<128, kMasks>)
                             : (narrow ? launch_backward_kernel<64, kNoRules> : launch_backward_kernel<128, kNoRules>);
    launch(params, add_dq, flags, stream);
  }
  if (!of_rows) return;
  BackwardParams of_dq = params;
  of_dq.dk.data = of_dq.dv.data = nullptr;
  universal::launch_backward<float>(of_dq, flags, stream);
}

}  // namespace flash_attn::cuda::universal::float32
