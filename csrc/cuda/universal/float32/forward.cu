#include "../forward_launch.h"
#include "float32.h"
#include "forward_kernel.h"

namespace flash_attn::cuda::universal::float32 {

bool takes(const ForwardParams& p) {
  constexpr int64_t kFewQueries = 64;  // of which a tile of the other kernels has no more
  return p.dtype == DType::kFloat32 && p.seqlen_q > kFewQueries && reads_mask(p.mask) && !p.cache.exists() &&
         forward_bucket(p) > 16 && p.head_dim > 0 && p.head_dim_v > 0 && counts_fit(p) &&
         has_whole_chunks(p.q, p.head_dim) && has_whole_chunks(p.k, p.head_dim) &&
         has_whole_chunks(p.v, p.head_dim_v) && has_whole_chunks(p.out, p.head_dim_v);
}

void forward(const ForwardParams& p, const int* flags, cudaStream_t stream) {
  if (!takes(p)) return universal::launch_forward<float>(p, flags, stream);
  const bool narrow = block_columns(p) == 64;
  auto* const launch = is_extended(p) ? (narrow ? launch_forward_kernel<64, true> : launch_forward_kernel<128, true>)
                                      : (narrow ? launch_forward_kernel<64, false> : launch_forward_kernel<128, false>);
  launch(p, flags, stream);
}

}  // namespace flash_attn::cuda::universal::float32
