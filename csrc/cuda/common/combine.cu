#include "combine.h"
#include "dependent_launch.h"
#include "launch.h"
#include "scores/softmax.h"
#include "tiles/order.h"

namespace flash_attn::cuda {
namespace {

constexpr int kWarps = 8;  // a CTA; one row each

template <typename Element>
__global__ void combine_kernel(const __grid_constant__ CombineParams params) {
  grid_dependency_wait();  // for the parts
  const TileSchedule& schedule = params.schedule;
  const ForwardParams& problem = params.problem;
  const int lane = threadIdx.x % 32;
  const int split_tile = blockIdx.y, row_in_tile = blockIdx.x * kWarps + threadIdx.x / 32;
  const TilePlace at = tile_place(schedule, problem, schedule.split_begin + split_tile);
  const SequenceInfo info = sequence_info(problem, at.batch);
  const int64_t row = int64_t{at.m_block} * params.block_m + row_in_tile;
  if (row >= info.seqlen_q_padded) return;

  const int parts = schedule.num_splits;
  const int64_t first = int64_t{split_tile} * parts * params.block_m + row_in_tile;
  const float2* const statistics = schedule.partial_statistics + first;
  float largest = -INFINITY, sum = 0.f;
  for (int i = 0; i < parts; ++i) largest = fmaxf(largest, statistics[int64_t{i} * params.block_m].x);
  for (int i = 0; i < parts; ++i) {
    const float2 part = statistics[int64_t{i} * params.block_m];
    if (part.y != 0.f) sum += fast_exp2((part.x - largest) * params.to_log2) * part.y;
  }
  const bool empty = sum == 0.f || row >= info.seqlen_q;

  Element* const out = static_cast<Element*>(problem.out.data) + at.batch * problem.out.batch +
                       (info.q_row + row) * problem.out.row + at.head * problem.out.head;
  for (int col = 4 * lane; col < problem.head_dim_v; col += 4 * 32) {
    float4 o = {0.f, 0.f, 0.f, 0.f};
    for (int i = 0; i < parts && !empty; ++i) {
      const float2 of_part = statistics[int64_t{i} * params.block_m];
      if (of_part.y == 0.f) continue;  // the row sees nothing of this part, whose O may be NaN there
      const float weight = fast_exp2((of_part.x - largest) * params.to_log2) / sum;
      const float4 part = *reinterpret_cast<const float4*>(
          schedule.partial_out + (first + int64_t{i} * params.block_m) * params.head_dim_v + col);
      o.x += weight * part.x;
      o.y += weight * part.y;
      o.z += weight * part.z;
      o.w += weight * part.w;
    }
    *reinterpret_cast<uint2*>(out + col) = {pack<Element>(o.x, o.y), pack<Element>(o.z, o.w)};
  }
  if (lane == 0) {
    const RowView& lse = problem.lse;
    static_cast<float*>(lse.data)[at.batch * lse.batch + at.head * lse.head + (info.q_row + row) * lse.row] =
        empty ? -INFINITY : log_sum_exp(largest, params.to_natural, sum);
  }
}

}  // namespace

void launch_combine(const CombineParams& params, cudaStream_t stream) {
  const dim3 grid(params.block_m / kWarps, params.schedule.num_tiles - params.schedule.split_begin);
  const auto kernel = params.problem.dtype == DType::kBFloat16 ? combine_kernel<__nv_bfloat16> : combine_kernel<__half>;
  launch_dependent(kernel, grid, 32 * kWarps, 0, stream, params, "combine");
}

}  // namespace flash_attn::cuda
