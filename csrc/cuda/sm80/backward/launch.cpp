#include "../../common/launch.h"

#include "../../common/shared_memory.h"
#include "plan.h"
#include "rows/rows.h"

namespace flash_attn::cuda::sm80 {
namespace {

constexpr double kLog2E = 1.4426950408889634;

QuerySteps query_steps(const TensorView& view, int block_m) {
  return {2 * view.head, 2 * view.row, 2 * view.row * block_m};
}

BackwardKernelParams kernel_params(const BackwardPlan& plan, const BackwardParams& problem) {
  const ForwardParams& p = problem.forward;
  const BackwardVariant& variant = *plan.variant;
  char* const workspace = static_cast<char*>(p.workspace);
  BackwardKernelParams params{};
  params.problem = problem;
  params.block_m = variant.block_m;
  params.block_n = variant.block_n;
  params.num_m_blocks = int(plan.num_m_blocks);
  params.num_n_blocks = int(plan.num_n_blocks);
  params.columns = variant.head_dim;
  params.scale_log2 = float(p.softmax_scale * kLog2E);
  params.lse_factor = variant.rules == Rules::kExtended || variant.rules == Rules::kBias ? 1.f : float(kLog2E);
  params.scale_over_softcap = p.softcap > 0.0 ? float(p.softmax_scale / p.softcap) : 0.f;
  params.inverse_softcap = p.softcap > 0.0 ? float(1.0 / p.softcap) : 0.f;
  params.falls = plan.ordered && plan.spread == 0;
  params.spread = plan.spread;
  params.aligned = plan.aligned;
  params.q = query_steps(p.q, variant.block_m);
  params.dout = query_steps(problem.dout, variant.block_m);
  params.share_rows = plan.share_rows;
  params.dq_accum = reinterpret_cast<float*>(workspace);
  params.minus_lse = reinterpret_cast<float*>(workspace + plan.minus_lse);
  params.minus_delta = reinterpret_cast<float*>(workspace + plan.minus_delta);
  if (plan.ordered) {
    params.turns = reinterpret_cast<int*>(workspace + plan.turns);
    params.next_tile = reinterpret_cast<int*>(workspace + plan.next_tile);
  }
  params.parts = plan.parts;
  if (plan.parts > 1) {
    params.dk_parts = reinterpret_cast<float*>(workspace + plan.dk_parts);
    params.dv_parts = reinterpret_cast<float*>(workspace + plan.dv_parts);
  }
  if (problem.dslopes != nullptr) params.slope_sums = reinterpret_cast<float*>(workspace + plan.slope_sums);
  return params;
}

/// May start before the rows are prepared, see kernel.h. There are fewer than 2^31 blocks: refusals.h.
void launch_tiles(const BackwardPlan& plan, const BackwardKernelParams& params, cudaStream_t stream) {
  const BackwardVariant& variant = *plan.variant;
  auto* const kernel = variant.kernel[params.problem.forward.dtype == DType::kBFloat16 ? 0 : 1];
  cuda::allow_shared_bytes(reinterpret_cast<const void*>(kernel), variant.shared_bytes, variant.name);
  cuda::launch_dependent(kernel, dim3(unsigned(plan.num_tiles * plan.parts)), 32 * variant.warps, variant.shared_bytes,
                         stream, params, variant.name);
}

void launch_mask_gradient(const MaskGradientVariant& variant, const BackwardKernelParams& params, cudaStream_t stream) {
  const MaskView& mask = params.problem.forward.mask;
  const MaskGradientParams arguments{params, int(ceil_div(mask.row_size, variant.block_m)),
                                     int(ceil_div(mask.col_size, variant.block_n)), 0};
  const int64_t tiles = mask.batch_size * mask.head_size * arguments.m_blocks * arguments.n_blocks;
  cuda::launch_blocks(variant.kernel[params.problem.forward.dtype == DType::kBFloat16 ? 0 : 1], arguments, tiles,
                      32 * variant.warps, variant.shared_bytes, stream, "sm80 dmask");
}

}  // namespace

void launch_backward(const BackwardPlan& plan, const BackwardParams& problem, cudaStream_t stream) {
  const BackwardVariant& variant = *plan.variant;
  BackwardKernelParams params = kernel_params(plan, problem);
  if (plan.packs_mask) {
    void* const to = static_cast<char*>(problem.forward.workspace) + plan.packed_mask;
    params.packed = mask::packed_or_pack(problem.forward.mask, to, stream);
  }
  prepare_rows(params, variant.warps, stream);
  if (plan.adds_mask_gradient) {
    const MaskView& mask = problem.forward.mask;
    const int64_t numbers = mask.batch_size * mask.head_size * mask.row_size * mask.col_size;
    cuda::check(cudaMemsetAsync(problem.dmask, 0, size_t(4 * numbers), stream), "sm80 clearing attn_mask's gradient");
    params.adds_mask_gradient = true;
    params.entries_beside =
        mask.batch_size == 1 && mask.head_size == problem.forward.num_heads && problem.forward.cu_seqlens_k == nullptr;
  }
  const bool dmask_alone = problem.dq.data == nullptr && problem.dk.data == nullptr && problem.dv.data == nullptr &&
                           problem.dslopes == nullptr && !plan.adds_mask_gradient;
  if (!dmask_alone) {
    launch_tiles(plan, params, stream);
    if (plan.parts > 1) store_keys(params, plan.num_tiles, stream);
  }
  if (plan.mask_gradient != nullptr) launch_mask_gradient(*plan.mask_gradient, params, stream);
  if (problem.dq.data != nullptr) store_dq(params, stream);
  if (problem.dsinks != nullptr) reduce_sinks(params, stream);
  if (problem.dslopes != nullptr) reduce_slopes(params, variant.warps, stream);
}

}  // namespace flash_attn::cuda::sm80
