#include "../../../common/launch.h"

#include "../../../common/tiles/visibility.h"
#include "../../../mask/unpacked_mask.h"
#include "../../../universal/rows.h"
#include "../../../universal/universal.h"
#include "../split.h"
#include "plan.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

bool has_pairs(const TensorView& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 8 == 0 && view.batch % 2 == 0 && view.row % 2 == 0 &&
         view.head % 2 == 0;
}

}  // namespace

void launch_forward(const ForwardParams& p, const ForwardPlan& plan, const DeviceInfo& device, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (p.is_varlen_q() || p.seqused_q != nullptr) {
    // Rows of no sequence: the kernels write those that take part alone.
    const bool packed = p.is_varlen_q();
    universal::fill_rows(p.out, p.dtype, packed ? 1 : p.batch, packed ? p.total_q : p.seqlen_q, p.num_heads,
                         p.head_dim_v, stream);
    universal::fill_lse(p, stream);
  }
  char* const workspace = static_cast<char*>(p.workspace);
  int* const flags = reinterpret_cast<int*>(workspace);
  const auto place = [&](Planes planes, int64_t data, int64_t units) {
    planes.data = reinterpret_cast<__half*>(workspace + data);
    planes.units = reinterpret_cast<float*>(workspace + units);
    return planes;
  };
  ForwardKernelParams params{};
  params.problem = p;
  params.schedule = plan.schedule;
  params.falls = rows_see_prefixes(p);
  params.slots = plan.slots;
  params.aligned = has_pairs(p.out);
  params.q = place(plan.q, plan.q_data, plan.q_units);
  params.k = place(plan.k, plan.k_data, plan.k_units);
  params.v = place(plan.v, plan.v_data, plan.v_units);
  params.flags = flags;
  const SplitSource sources[] = {{p.q, params.q, int(p.head_dim), true, false},
                                 {p.k, params.k, int(p.head_dim), false, true},
                                 {p.v, params.v, int(p.head_dim_v), false, true}};
  split(p, sources, 3, flags, stream);
  if (plan.packs_mask) params.packed = mask::packed_or_pack(p.mask, workspace + plan.packed_mask, stream);
  const ForwardVariant& variant = *plan.variant;
  cuda::launch_blocks(variant.kernel, params, plan.schedule.num_tiles, variant.threads, plan.shared_bytes(), stream,
                      variant.name);
  ForwardParams flagged = p;
  flagged.mask = mask::unpack(p.mask, workspace + plan.unpacked_mask, stream);
  universal::launch_float32(flagged, flags, device, stream);
}

}  // namespace flash_attn::cuda::sm80::fp32
