#include <algorithm>

#include "../../../common/dependent_launch.h"
#include "../../../common/launch.h"
#include "../../../common/scores/lost_of_lse.h"
#include "../../../common/tiles/packed_blocks.h"
#include "../extended/read_classes.h"
#include "../params.h"
#include "../rows.h"
#include "preprocess.h"
#include "statistics.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64;  // of a CTA

/// Neighbouring CTAs take neighbouring heads, whose rows lie side by side in the usual layout.
struct RowGroup {
  int64_t head;
  int64_t row;    // first of kRows
  int64_t block;  // of dq_accum and statistics
  int row_in_block;
};

__device__ RowGroup row_group(const RowsParams& p, const SequenceInfo& info, uint32_t b, uint32_t head,
                              uint32_t group) {
  const uint32_t groups_of_block = p.block_m / kRows, m_block = group / groups_of_block;
  const int64_t first = first_block(p.problem.forward, info, b, p.block_m, p.num_m_blocks);
  return {head, int64_t{group} * kRows, int64_t{head} * p.num_blocks + first + m_block,
          static_cast<int>((group - m_block * groups_of_block) * kRows)};
}

/// The rows of this CTA, of all heads of packed sequences. False: before the first sequence.
__device__ bool find_packed_rows(const RowsParams& params, SequenceInfo& info, uint32_t& b, RowGroup& at) {
  const uint32_t num_heads = params.problem.forward.num_heads, groups = params.block_m / kRows;
  const uint32_t all_groups = blockIdx.x / num_heads, number = all_groups / groups;
  const SequenceBlocks::Place place = params.m_blocks.find(number);
  if (place.index < 0) return false;
  b = place.batch;
  info = sequence_info(params.problem.forward, b);
  at = row_group(params, info, b, blockIdx.x - all_groups * num_heads,
                 place.index * groups + all_groups - number * groups);
  return true;
}

/// The rows of this CTA, of the first prepared_heads.
__device__ void find_rows(const RowsParams& params, SequenceInfo& info, uint32_t& b, RowGroup& at) {
  const uint32_t heads = params.prepared_heads, num_heads = params.problem.forward.num_heads;
  const uint32_t group = blockIdx.x / heads, all_heads = blockIdx.x - group * heads;
  b = all_heads / num_heads;
  info = sequence_info(params.problem.forward, b);
  at = row_group(params, info, b, all_heads - b * num_heads, group);
}

/// The same of the first prepared_tiles: those beside the keys of a tile, of each of its heads. False: no such tile.
__device__ bool find_rows_beside(const RowsParams& params, SequenceInfo& info, uint32_t& b, RowGroup& at) {
  const PackedBlocksParams& packed = params.packed_blocks;
  const uint32_t groups = packed.block_n / kRows, heads_of_tile = params.problem.forward.num_heads / packed.heads;
  const uint32_t tile = blockIdx.x / (groups * heads_of_tile), in_tile = blockIdx.x - tile * groups * heads_of_tile;
  const PackedBlock block = packed.blocks[tile / packed.heads];
  if (block.sequence < 0) return false;
  const uint32_t in_sequence = tile - block.first * packed.heads, head = in_sequence / block.count;
  const uint32_t n_block = in_sequence - head * block.count, group = in_tile / heads_of_tile;
  b = block.sequence;
  info = sequence_info(params.problem.forward, b);
  at = row_group(params, info, b, head * heads_of_tile + in_tile - group * heads_of_tile, n_block * groups + group);
  return true;
}

/// All threads of the launch.
__device__ void clear(const RowsParams& params) {
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < params.num_cleared; i += threads) {
    params.cleared[i] = uint4{};
  }
}

/// For kernels of extended/, and of those the ones under an additive attn_mask, whose lse may have lost something, and
/// those under a boolean one that further CTAs read: what counts such rows again takes registers, and so does that.
enum class Statistics { kPlain, kExtended, kCounted, kBesideMask };

/// One CTA: kRows query rows of a head; kDqColumns / 8 lanes a row.
template <typename Element, int kDqColumns, Statistics kStatistics, bool kConditional>
__global__ void __launch_bounds__(kThreads) preprocess_kernel(const __grid_constant__ RowsParams params) {
  constexpr int kLanes = kDqColumns / 8, kRowsAtOnce = kThreads / kLanes, kPasses = kRows / kRowsAtOnce;
  constexpr int kMost = kStatistics == Statistics::kPlain || kDqColumns != 128 ? 4 : 2;
  constexpr int kInFlight = kPasses < kMost ? kPasses : kMost;  // so that registers allow three CTAs an SM
  if constexpr (kConditional) {
    if (params.condition.excludes()) return;
  }
  grid_launch_dependents();
  clear(params);
  const ForwardParams& p = params.problem.forward;
  if constexpr (kStatistics == Statistics::kBesideMask) {
    const int number = static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x) + params.unpacked_mask.count;
    if (number >= 0) return read_tile_classes(p.mask, params.unpacked_mask, params.block_m, number);
  }
  SequenceInfo info;
  RowGroup at;
  uint32_t b;
  if (params.prepared_tiles > 0) {
    if (!find_rows_beside(params, info, b, at)) return;
  } else if (params.m_blocks.starts != nullptr) {
    if (!find_packed_rows(params, info, b, at)) return;
  } else {
    find_rows(params, info, b, at);
  }
  if (at.row - at.row_in_block >= info.seqlen_q) return;  // a block that no tile visits

  const int64_t accum_row = at.block * params.block_m + at.row_in_block;
  if (params.zeroes_dq) {
    float4* const accum = reinterpret_cast<float4*>(params.dq_accum + accum_row * kDqColumns);
#pragma unroll
    for (int i = threadIdx.x; i < kRows * kDqColumns / 4; i += kThreads) accum[i] = {0.f, 0.f, 0.f, 0.f};
  }

  const int lane = threadIdx.x % kLanes, thread_row = threadIdx.x / kLanes;
  const int64_t q_batch = p.cu_seqlens_q != nullptr ? 0 : b;
  // Lane i takes the row of pass i from its sum to its statistics.
  const int own_row = thread_row + lane * kRowsAtOnce;
  float lse = -INFINITY, dlse = 0.f, delta = 0.f;
  if (lane < kPasses && at.row + own_row < info.seqlen_q) {
    const auto statistic = [&](const RowView& view) {
      return static_cast<const float*>(
          view.data)[q_batch * view.batch + at.head * view.head + (info.q_row + at.row + own_row) * view.row];
    };
    lse = statistic(p.lse);
    if (params.problem.dlse.data != nullptr) dlse = statistic(params.problem.dlse);
  }
#pragma unroll 1
  for (int first = 0; first < kPasses; first += kInFlight) {
    uint4 out[kInFlight], dout[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t row = at.row + thread_row + (first + i) * kRowsAtOnce;
      out[i] = dout[i] = {0, 0, 0, 0};
      if (row >= info.seqlen_q || 8 * lane >= p.head_dim_v) continue;
      out[i] = reinterpret_cast<const uint4*>(row_pointer(p.out, q_batch, info.q_row + row, at.head))[lane];
      dout[i] =
          reinterpret_cast<const uint4*>(row_pointer(params.problem.dout, q_batch, info.q_row + row, at.head))[lane];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      float sum = dot8<Element>(out[i], dout[i], 0.f);
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (lane == first + i) delta = sum;
    }
  }
  if constexpr (kStatistics != Statistics::kPlain) {
    float lost = 0.f;
    if constexpr (kStatistics == Statistics::kCounted) {
      lost = RowCounter<Element, float>{p, info, b, at.head, true}.lost_of(
          at.row + own_row, lse, [&](int64_t place) { return bias_value(p.mask, place); });
    }
    const bool blind = lane < kPasses && at.row + own_row < info.seqlen_q && lse == -INFINITY;
    const int any_blind = __syncthreads_or(blind);
    if (threadIdx.x == 0) params.blind[accum_row / kRows] = any_blind;
    if (lane >= kPasses) return;
    constexpr float kLog2E = 1.4426950408889634f;
    float* const to =
        reinterpret_cast<float*>(params.statistics) + at.block * 4 * params.block_m + at.row_in_block + own_row;
    const bool sees = lse != -INFINITY;  // NaN does
    to[0] = sees ? -lse * kLog2E : lse;
    to[params.block_m] = sees ? dlse - delta : 0.f;
    to[2 * params.block_m] = sees ? -lse : lse;
    to[3 * params.block_m] = -lost * kLog2E;
    return;
  }
  if (lane >= kPasses) return;
  const float scale = static_cast<float>(p.softmax_scale);
  params.statistics[accum_row + own_row] = row_statistics<Element>(lse, delta - dlse, scale, 1.f / scale);
}

/// Rows [begin, end) of a packed tensor.
__device__ void clear_rows(const TensorView& view, int64_t begin, int64_t end, int64_t heads, int64_t head_dim) {
  if (view.data == nullptr) return;
  const int64_t chunks = head_dim / 8;
  for (int64_t i = threadIdx.x; i < (end - begin) * heads * chunks; i += kThreads) {
    auto* const row = const_cast<uint16_t*>(row_pointer(view, 0, begin + i / chunks / heads, i / chunks % heads));
    reinterpret_cast<uint4*>(row)[i % chunks] = uint4{};
  }
}

/// By one CTA. With wrong lengths there may be more than there is room for: then the last sequences are left out.
__device__ void list_blocks(const ForwardParams& p, const PackedBlocksParams& packed) {
  const auto rows = [&](int b) { return sequence_info(p, b).seqlen_k_padded; };
  const auto say_count = [&](int count) { packed.blocks[packed.num_blocks] = {-1, count, 0, 0}; };
  const int all = count_blocks<kThreads>(p.batch, packed.block_n, rows, [&](int b, int first, int count, int all) {
    const int end = first + count, in_last = all - end < packed.last_blocks;
    const bool fits = end <= packed.num_blocks;
    if (!fits && first <= packed.num_blocks) say_count(first);
    for (int i = first; i < min(end, packed.num_blocks); ++i) packed.blocks[i] = {fits ? b : -1, first, count, in_last};
  });
  for (int i = all + threadIdx.x; i < packed.num_blocks; i += kThreads) packed.blocks[i] = {-1, 0, 0, 0};
  if (threadIdx.x == 0 && all <= packed.num_blocks) say_count(all);
}

/// CTAs share out the gaps: before sequence b, and after the last. The first lists the blocks of keys.
__global__ void __launch_bounds__(kThreads)
    clear_gaps_kernel(const __grid_constant__ BackwardParams params, const PackedBlocksParams packed) {
  const ForwardParams& p = params.forward;
  if (blockIdx.x == 0 && packed.blocks != nullptr) list_blocks(p, packed);
  for (int64_t b = blockIdx.x; b <= p.batch; b += gridDim.x) {
    int64_t q_begin = 0, q_end = p.total_q, k_begin = 0, k_end = p.total_k;
    if (b > 0) {
      const SequenceInfo last = sequence_info(p, b - 1);
      q_begin = last.q_row + last.seqlen_q_padded;
      k_begin = last.k_row + last.seqlen_k_padded;
    }
    if (b < p.batch) {
      const SequenceInfo next = sequence_info(p, b);
      q_end = next.q_row;
      k_end = next.k_row;
    }
    if (p.cu_seqlens_q != nullptr) clear_rows(params.dq, q_begin, q_end, p.num_heads, p.head_dim);
    if (p.cu_seqlens_k != nullptr) {
      clear_rows(params.dk, k_begin, k_end, p.num_heads_k, p.head_dim);
      clear_rows(params.dv, k_begin, k_end, p.num_heads_k, p.head_dim_v);
    }
  }
}

template <typename Element, Statistics kStatistics, bool kConditional>
auto preprocess_for(int dq_columns) {
  return dq_columns == 64    ? preprocess_kernel<Element, 64, kStatistics, kConditional>
         : dq_columns == 128 ? preprocess_kernel<Element, 128, kStatistics, kConditional>
                             : preprocess_kernel<Element, 256, kStatistics, kConditional>;
}

template <typename Element>
auto preprocess_for(const RowsParams& params) {
  const int columns = params.dq_columns;
  if (!params.extended) {
    return params.condition.exists() ? preprocess_for<Element, Statistics::kPlain, true>(columns)
                                     : preprocess_for<Element, Statistics::kPlain, false>(columns);
  }
  if (params.problem.forward.has_bias()) return preprocess_for<Element, Statistics::kCounted, true>(columns);
  return params.unpacked_mask.count > 0 ? preprocess_for<Element, Statistics::kBesideMask, false>(columns)
                                        : preprocess_for<Element, Statistics::kExtended, true>(columns);
}

template <typename Element>
void launch_prepare(const RowsParams& params, cudaStream_t stream) {
  const ForwardParams& p = params.problem.forward;
  const PackedBlocksParams& packed = params.packed_blocks;
  const int64_t groups_of_block = params.block_m / kRows;
  const int64_t groups =
      params.prepared_tiles > 0 ? params.prepared_tiles * (p.num_heads / packed.heads) * (packed.block_n / kRows)
      : params.m_blocks.starts != nullptr ? params.m_blocks.count() * p.num_heads * groups_of_block
                                          : params.prepared_heads * params.num_m_blocks * groups_of_block;
  preprocess_for<Element>(params)<<<static_cast<unsigned>(groups + params.unpacked_mask.count), kThreads, 0, stream>>>(
      params);
  check(cudaGetLastError(), "sm90 backward statistics");
}

}  // namespace

void launch_preprocess(const RowsParams& params, cudaStream_t stream) {
  const ForwardParams& p = params.problem.forward;
  if (p.is_varlen_q() || p.is_varlen_k()) {
    clear_gaps_kernel<<<static_cast<unsigned>(std::min<int64_t>(p.batch + 1, 128)), kThreads, 0, stream>>>(
        params.problem, params.packed_blocks);
    check(cudaGetLastError(), "sm90 clearing gradients");
  }
  p.dtype == DType::kBFloat16 ? launch_prepare<__nv_bfloat16>(params, stream) : launch_prepare<__half>(params, stream);
}

}  // namespace flash_attn::cuda::sm90::backward
