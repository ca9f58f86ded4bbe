#include "launch.h"

#include "../../common/combine.h"
#include "../../common/launch.h"
#include "../../common/tiles/visibility.h"
#include "../../universal/rows.h"
#include "plan.h"

namespace flash_attn::cuda::sm80 {

namespace {

bool has_mask_pairs(const MaskView& mask) {
  const int64_t bytes = 2 * size_of(mask.dtype);
  return mask.col == 1 && reinterpret_cast<uintptr_t>(mask.data) % bytes == 0 && mask.batch % 2 == 0 &&
         mask.head % 2 == 0 && mask.row % 2 == 0;
}

}  // namespace

void launch_forward(const ForwardParams& p, const DeviceInfo& device, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const ForwardPlan plan = plan_forward(p, device);
  if (p.is_varlen_q() || p.seqused_q != nullptr) {
    // Rows of no sequence: the kernel writes those that take part alone.
    const bool packed = p.is_varlen_q();
    universal::fill_rows(p.out, p.dtype, packed ? 1 : p.batch, packed ? p.total_q : p.seqlen_q, p.num_heads,
                         p.head_dim_v, stream);
    universal::fill_lse(p, stream);
  }
  ForwardKernelParams params;
  params.problem = p;
  params.schedule = plan.schedule;
  if (plan.is_split()) {
    char* const partial = static_cast<char*>(p.workspace) + plan.partial_out;
    params.schedule.partial_out = reinterpret_cast<float*>(partial);
    params.schedule.partial_statistics = reinterpret_cast<float2*>(partial + plan.partial_out_bytes);
  }
  const ForwardVariant& variant = *plan.variant;
  const auto bytes_of_rows = [](const TensorView& view, int rows) { return view.row * rows * 2; };
  params.k_copy_step = bytes_of_rows(p.k, variant.copy_step),
  params.v_copy_step = bytes_of_rows(p.v, variant.copy_step);
  params.k_tile_step = bytes_of_rows(p.k, variant.block_n), params.v_tile_step = bytes_of_rows(p.v, variant.block_n);
  params.mask_row = 2 * p.mask.row;
  params.falls = rows_see_prefixes(p);
  params.aligned = plan.aligned;
  if (plan.packs_mask) params.packed = mask::packed_or_pack(p.mask, p.workspace, stream);
  params.seen_words = plan.seen_words;
  params.mask_pairs = has_mask_pairs(p.mask);
  cuda::launch_blocks(variant.kernel[p.dtype == DType::kBFloat16 ? 0 : 1], params, plan.num_blocks(), variant.threads,
                      plan.shared_bytes(), stream, variant.name);
  if (plan.is_split()) {
    // The maxima are as S is: natural in extended kernels, which do not share out keys, else q.k.
    const float to_natural = float(p.softmax_scale), to_log2 = to_natural * 1.44269504f;
    launch_combine({p, params.schedule, variant.block_m, variant.head_dim, to_natural, to_log2}, stream);
  }
}

}  // namespace flash_attn::cuda::sm80
