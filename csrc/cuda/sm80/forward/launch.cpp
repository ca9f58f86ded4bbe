#include "launch.h"

#include "../../common/launch.h"
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
  params.num_m_blocks = int(plan.num_m_blocks);
  params.group_size = int(p.group_size());
  params.heads_per_group = plan.heads_per_group;
  params.slots = plan.slots;
  params.longest_first = plan.longest_first;
  params.aligned = plan.aligned;
  if (plan.packs_mask) params.packed = mask::packed_or_pack(p.mask, p.workspace, stream);
  params.seen_words = plan.seen_words;
  params.mask_pairs = has_mask_pairs(p.mask);
  const ForwardVariant& variant = *plan.variant;
  cuda::launch_blocks(variant.kernel[p.dtype == DType::kBFloat16 ? 0 : 1], params, plan.num_tiles, variant.threads,
                      plan.shared_bytes(), stream, variant.name);
}

}  // namespace flash_attn::cuda::sm80
