#include "../../../common/launch.h"

#include "../../../mask/unpacked_mask.h"
#include "../../../universal/backward_launch.h"
#include "../../../universal/universal.h"
#include "../split.h"
#include "plan.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

bool has_pairs(const TensorView& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 8 == 0 && view.batch % 2 == 0 && view.row % 2 == 0 &&
         view.head % 2 == 0;
}

void launch(const BackwardVariant& variant, BackwardKernelParams& params, cudaStream_t stream) {
  const ForwardParams& p = params.problem.forward;
  params.blocks =
      variant.of_keys() ? SequenceBlocks::of_keys(p, variant.block_m) : SequenceBlocks::of_queries(p, variant.block_m);
  cuda::launch_blocks(variant.kernel, params, params.blocks.count() * (variant.of_keys() ? p.num_heads_k : p.num_heads),
                      variant.threads, variant.shared_bytes, stream, variant.name);
}

/// Zeros, to which blocks add.
void clear_dq(const BackwardParams& problem, cudaStream_t stream) {
  const ForwardParams& p = problem.forward;
  const TensorView& dq = problem.dq;
  const bool packed = p.is_varlen_q();
  const int64_t batch = packed ? 1 : p.batch, rows = packed ? p.total_q : p.seqlen_q;
  const bool by_rows =
      dq.head == p.head_dim && dq.row == p.num_heads * dq.head && (packed || dq.batch == rows * dq.row);
  const bool by_heads =
      dq.row == p.head_dim && dq.head == rows * dq.row && (packed || dq.batch == p.num_heads * dq.head);
  if (by_rows || by_heads) {
    cuda::check(cudaMemsetAsync(dq.data, 0, size_t(batch * rows * p.num_heads * p.head_dim) * sizeof(float), stream),
                "float32 dq");
  } else {
    universal::fill_rows(dq, p.dtype, batch, rows, p.num_heads, p.head_dim, stream);
  }
}

}  // namespace

void launch_backward(const BackwardParams& problem, const BackwardPlan& plan, const DeviceInfo& device,
                     void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const ForwardParams& p = problem.forward;
  universal::fill_gradients(problem, stream);
  if (plan.adds_dq()) clear_dq(problem, stream);
  char* const workspace = static_cast<char*>(p.workspace);
  int* const flags = reinterpret_cast<int*>(workspace + plan.flags);
  const auto place = [&](Planes planes, int64_t data, int64_t units) {
    planes.data = reinterpret_cast<__half*>(workspace + data);
    planes.units = reinterpret_cast<float*>(workspace + units);
    return planes;
  };
  BackwardKernelParams params{};
  params.problem = problem;
  params.rows = universal::RowWorkspace::in(problem);
  params.q = place(plan.q, plan.q_data, plan.q_units);
  params.k = place(plan.k, plan.k_data, plan.k_units);
  params.v = place(plan.v, plan.v_data, plan.v_units);
  params.dout = place(plan.dout, plan.dout_data, plan.dout_units);
  params.flags = flags;
  params.group_size = int(p.group_size());
  params.pairs_q = has_pairs(problem.dq);
  params.pairs_k = has_pairs(problem.dk);
  params.pairs_v = has_pairs(problem.dv);
  const SplitSource sources[] = {{p.q, params.q, int(p.head_dim), true, false},
                                 {problem.dout, params.dout, int(p.head_dim_v), true, false},
                                 {p.k, params.k, int(p.head_dim), false, true},
                                 {p.v, params.v, int(p.head_dim_v), false, true}};
  split(p, sources, 4, flags, stream);
  BackwardParams rest = problem;  // of what is flagged
  rest.forward.mask = mask::unpack(p.mask, workspace + plan.unpacked_mask, stream);
  universal::prepare_rows(rest, flags, stream);
  if (plan.packs_mask) params.packed = mask::packed_or_pack(p.mask, workspace + plan.packed_mask, stream);
  float* const dmask = plan.adds_mask_gradient ? static_cast<float*>(problem.dmask) : nullptr;
  if (dmask != nullptr) {
    const MaskView& mask = p.mask;
    const int64_t size = mask.batch_size * mask.head_size * mask.row_size * mask.col_size;
    cuda::check(cudaMemsetAsync(dmask, 0, size_t(size) * sizeof(float), stream), "float32 dmask");
  }
  const int wanted = (problem.dq.data != nullptr || problem.dslopes != nullptr || dmask != nullptr ? kDq : 0) |
                     (problem.dk.data != nullptr ? kDk : 0) | (problem.dv.data != nullptr ? kDv : 0);
  for (const BackwardVariant* variant : plan.kernels) {
    if (variant == nullptr || (variant->gradients & wanted) == 0) continue;
    params.dmask = (variant->gradients & kDq) != 0 ? dmask : nullptr;
    launch(*variant, params, stream);
  }
  universal::launch_float32(rest, flags, device, stream);
  if (rest.dmask != nullptr) universal::launch_mask_gradient<float>(rest, dmask != nullptr ? flags : nullptr, stream);
  universal::reduce_rows(problem, stream);
}

}  // namespace flash_attn::cuda::sm80::fp32
