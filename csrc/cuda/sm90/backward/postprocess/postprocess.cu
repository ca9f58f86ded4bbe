#include "../../../common/dependent_launch.h"
#include "../../../common/launch.h"
#include "../../../common/tiles/sequence_blocks.h"
#include "../params.h"
#include "../rows.h"
#include "postprocess.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

constexpr int kThreads = 256;

/// One CTA: two 64 x 64 tiles of dq_accum (params.h), by way of shared memory to whole rows.
/// kMasked: under attn_mask or rules of scores, or perhaps not at all.
template <typename Element, bool kMasked>
__global__ void __launch_bounds__(kThreads) convert_dq_kernel(const __grid_constant__ RowsParams params) {
  if constexpr (kMasked) {
    if (params.condition.excludes()) return;
  }
  constexpr int kPadded = 64 + 8;  // 16-bit elements; rows then start in different banks
  __shared__ __align__(16) uint16_t tiles[2][64][kPadded];
  const ForwardParams& p = params.problem.forward;
  const int tiles_per_block = params.block_m * params.dq_columns / kDqTile, pairs = tiles_per_block / 2;
  const uint32_t heads = p.num_heads, number = blockIdx.x / (heads * pairs);
  const uint32_t in_block = blockIdx.x - number * heads * pairs, head = in_block / pairs;
  const auto [b, m_block] = params.m_blocks.find(number);
  const SequenceInfo info = sequence_info(p, b);
  const int64_t block_row = int64_t{m_block} * params.block_m;
  grid_dependency_wait();
  if (block_row < 0 || block_row >= info.seqlen_q_padded) return;

  const int tile = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int first_tile = (in_block - head * pairs) * 2;
  const int64_t block =
      int64_t{head} * params.num_blocks + first_block(p, info, b, params.block_m, params.num_m_blocks) + m_block;
  const float4* const accum = reinterpret_cast<const float4*>(
      params.dq_accum + (block * tiles_per_block + first_tile + tile) * kDqTile + warp * (kDqTile / 4));
  const float scale = params.dq_scale;
  // Where no tile has stored anything, because no row sees a key, dq_accum is undefined.
  const int64_t block_end = block_row + params.block_m < info.seqlen_q ? block_row + params.block_m : info.seqlen_q;
  const Range seen = visible_columns(p, info, block_row, block_end);
  bool defined = block_row < block_end && seen.begin < seen.end;
  if constexpr (kMasked) {
    if (params.dq_counters != nullptr) defined = defined && params.dq_counters[block].claim != 0;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float4 x = defined ? __ldcs(accum + j * 32 + lane) : float4{0.f, 0.f, 0.f, 0.f};
    uint16_t* const to = &tiles[tile][16 * warp + lane / 4][8 * j + 2 * (lane % 4)];
    *reinterpret_cast<uint32_t*>(to) = pack<Element>(x.x * scale, x.y * scale);
    *reinterpret_cast<uint32_t*>(to + 8 * kPadded) = pack<Element>(x.z * scale, x.w * scale);
  }
  __syncthreads();

  const int tiles_per_row = params.dq_columns / 64;
  const int64_t q_batch = p.cu_seqlens_q != nullptr ? 0 : b;
#pragma unroll
  for (int i = threadIdx.x; i < 2 * 64 * 8; i += kThreads) {
    const int t = i / 512, tile_row = i / 8 % 64, chunk = i % 8;
    const int64_t row = block_row + (first_tile + t) / tiles_per_row * 64 + tile_row;
    const int64_t col = (first_tile + t) % tiles_per_row * 64 + chunk * 8;
    if (row >= info.seqlen_q_padded || col >= p.head_dim) continue;
    const uint4 x = row < info.seqlen_q ? *reinterpret_cast<const uint4*>(&tiles[t][tile_row][chunk * 8]) : uint4{};
    auto* const to = const_cast<uint16_t*>(row_pointer(params.problem.dq, q_batch, info.q_row + row, head));
    *reinterpret_cast<uint4*>(to + col) = x;
  }
}

/// Of `rows` rows of a key head.
template <typename Element>
__device__ void add_parts(const TensorView& parts, const TensorView& sum, int num_parts, uint32_t columns,
                          int64_t batch, int64_t row, int64_t rows, int64_t head) {
  if (sum.data == nullptr) return;
  const uint32_t chunks = columns / 8;
  for (uint32_t i = threadIdx.x; i < rows * chunks; i += kThreads) {
    const uint32_t in_rows = i / chunks, chunk = i - in_rows * chunks;
    const uint16_t* from = row_pointer(parts, batch, row + in_rows, head * num_parts);
    float total[8] = {};
#pragma unroll 8
    for (int part = 0; part < num_parts; ++part, from += parts.head) {
      const uint4 x = __ldcs(reinterpret_cast<const uint4*>(from) + chunk);
      const Element* const elements = reinterpret_cast<const Element*>(&x);
#pragma unroll
      for (int e = 0; e < 8; ++e) total[e] += static_cast<float>(elements[e]);
    }
    auto* const to = const_cast<uint16_t*>(row_pointer(sum, batch, row + in_rows, head));
    reinterpret_cast<uint4*>(to)[chunk] = {pack<Element>(total[0], total[1]), pack<Element>(total[2], total[3]),
                                           pack<Element>(total[4], total[5]), pack<Element>(total[6], total[7])};
  }
}

constexpr int kKeyRows = 16;  // of a CTA, of one head's dk or dv

struct AddPartsParams {
  PartsParams parts;
  SequenceBlocks groups;  // of kKeyRows keys
  mask::KindCondition condition;
};

template <typename Element, bool kConditional>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const __grid_constant__ AddPartsParams arguments) {
  if constexpr (kConditional) {
    if (arguments.condition.excludes()) return;
  }
  const PartsParams& params = arguments.parts;
  const ForwardParams& p = params.problem.forward;
  const uint32_t heads = p.num_heads_k, number = blockIdx.x / heads, head = blockIdx.x - number * heads;
  const auto [b, group] = arguments.groups.find(number);
  const SequenceInfo info = sequence_info(p, b);
  const int64_t first = int64_t{group} * kKeyRows;
  const int64_t rows = info.seqlen_k_padded - first < kKeyRows ? info.seqlen_k_padded - first : kKeyRows;
  grid_dependency_wait();
  if (first < 0 || rows <= 0) return;
  const int64_t batch = p.cu_seqlens_k != nullptr ? 0 : b, row = info.k_row + first;
  const bool is_dk = blockIdx.y == 0;
  add_parts<Element>(is_dk ? params.dk_parts : params.dv_parts, is_dk ? params.problem.dk : params.problem.dv,
                     params.num_parts, is_dk ? p.head_dim : p.head_dim_v, batch, row, rows, head);
}

}  // namespace

void launch_add_parts(const PartsParams& params, const mask::KindCondition& condition, cudaStream_t stream) {
  const ForwardParams& p = params.problem.forward;
  const AddPartsParams arguments{params, SequenceBlocks::of_keys(p, kKeyRows), condition};
  const int64_t ctas = arguments.groups.count() * p.num_heads_k;
  const bool bf16 = p.dtype == DType::kBFloat16;
  const auto kernel = !condition.exists()
                          ? (bf16 ? add_parts_kernel<__nv_bfloat16, false> : add_parts_kernel<__half, false>)
                          : (bf16 ? add_parts_kernel<__nv_bfloat16, true> : add_parts_kernel<__half, true>);
  launch_dependent(kernel, dim3(static_cast<unsigned>(ctas), 2), kThreads, 0, stream, arguments, "sm90 backward dk dv");
}

void launch_convert_dq(const RowsParams& params, cudaStream_t stream) {
  const ForwardParams& p = params.problem.forward;
  const int64_t pairs = int64_t{params.block_m} * params.dq_columns / (2 * kDqTile);
  const int64_t ctas = params.m_blocks.count() * p.num_heads * pairs;
  const bool bf16 = p.dtype == DType::kBFloat16;
  const auto kernel = !params.condition.exists() && !params.extended
                          ? (bf16 ? convert_dq_kernel<__nv_bfloat16, false> : convert_dq_kernel<__half, false>)
                          : (bf16 ? convert_dq_kernel<__nv_bfloat16, true> : convert_dq_kernel<__half, true>);
  launch_dependent(kernel, dim3(static_cast<unsigned>(ctas)), kThreads, 0, stream, params, "sm90 backward dq");
}

}  // namespace flash_attn::cuda::sm90::backward
