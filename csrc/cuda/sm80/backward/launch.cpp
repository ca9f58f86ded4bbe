#include "../../common/launch.h"

#include "plan.h"
#include "rows.h"

namespace flash_attn::cuda::sm80 {
namespace {

constexpr double kLog2E = 1.4426950408889634;

MaskCells mask_cells(const BackwardKernelParams& params, const int* visible, const uint32_t* bits) {
  const MaskView& mask = params.problem.forward.mask;
  const auto stride = [](int64_t size, int64_t step) { return size > 1 ? step : 0; };
  const int64_t m_blocks = ceil_div(mask.row_size, params.block_m), n_blocks = ceil_div(mask.col_size, params.block_n);
  const int64_t query_cells = ceil_div(mask.row_size, MaskCells::kCell);
  const int64_t words = 32 * query_cells * ceil_div(mask.col_size, MaskCells::kCell);
  MaskCells cells;
  cells.visible = visible;
  cells.visible_batch = stride(mask.batch_size, mask.head_size * m_blocks * n_blocks);
  cells.visible_head = stride(mask.head_size, m_blocks * n_blocks);
  cells.n_block = stride(mask.col_size, m_blocks);
  cells.m_block = stride(mask.row_size, 1);
  cells.bits = bits;
  cells.bits_batch = stride(mask.batch_size, mask.head_size * words);
  cells.bits_head = stride(mask.head_size, words);
  cells.key_cell = stride(mask.col_size, 32 * query_cells);
  cells.query_cell = stride(mask.row_size, 32);
  return cells;
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
  params.lse_factor = variant.extended ? 1.f : float(kLog2E);
  params.scale_over_softcap = p.softcap > 0.0 ? float(p.softmax_scale / p.softcap) : 0.f;
  params.inverse_softcap = p.softcap > 0.0 ? float(1.0 / p.softcap) : 0.f;
  params.descends = plan.ordered;
  params.aligned = plan.aligned;
  params.dq_accum = reinterpret_cast<float*>(workspace);
  params.minus_lse = reinterpret_cast<float*>(workspace + plan.minus_lse);
  params.minus_delta = reinterpret_cast<float*>(workspace + plan.minus_delta);
  if (plan.ordered) {
    params.turns = reinterpret_cast<int*>(workspace + plan.turns);
    params.next_tile = reinterpret_cast<int*>(workspace + plan.next_tile);
  }
  if (problem.dslopes != nullptr) params.slope_sums = reinterpret_cast<float*>(workspace + plan.slope_sums);
  if (plan.reads_mask) {
    params.mask_cells =
        mask_cells(params, reinterpret_cast<const int*>(workspace + plan.visible),
                   p.has_bool_mask() ? reinterpret_cast<const uint32_t*>(workspace + plan.bits) : nullptr);
  }
  return params;
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
  const BackwardKernelParams params = kernel_params(plan, problem);
  if (plan.reads_mask) {
    char* const workspace = static_cast<char*>(problem.forward.workspace);
    read_mask(params, reinterpret_cast<int*>(workspace + plan.visible),
              problem.forward.has_bool_mask() ? reinterpret_cast<uint32_t*>(workspace + plan.bits) : nullptr, stream);
  }
  prepare_rows(params, variant.warps, stream);
  cuda::launch_blocks(variant.kernel[problem.forward.dtype == DType::kBFloat16 ? 0 : 1], params, plan.num_tiles,
                      32 * variant.warps, variant.shared_bytes, stream, variant.name);
  if (plan.mask_gradient != nullptr) launch_mask_gradient(*plan.mask_gradient, params, stream);
  if (problem.dq.data != nullptr) store_dq(params, stream);
  if (problem.dsinks != nullptr) reduce_sinks(params, stream);
  if (problem.dslopes != nullptr) reduce_slopes(params, variant.warps, stream);
}

}  // namespace flash_attn::cuda::sm80
