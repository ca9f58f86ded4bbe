#include <algorithm>

#include "backward_rows.h"
#include "backward_statistics.h"
#include "backward_tile.h"
#include "launch.h"
#include "packed_blocks.h"

namespace flash_attn::sm90 {
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

__device__ RowGroup row_group(const BackwardRowsParams& p, const SequenceInfo& info, uint32_t b, uint32_t head,
                              uint32_t group) {
  const uint32_t groups_of_block = p.block_m / kRows, m_block = group / groups_of_block;
  const int64_t first = first_block(p.problem.forward, info, b, p.block_m, p.num_m_blocks);
  return {head, int64_t{group} * kRows, int64_t{head} * p.num_blocks + first + m_block,
          static_cast<int>((group - m_block * groups_of_block) * kRows)};
}

__device__ const uint16_t* row_pointer(const TensorView& view, int64_t b, int64_t row, int64_t head) {
  return static_cast<const uint16_t*>(view.data) + b * view.batch + row * view.row + head * view.head;
}

/// The rows of this CTA, of the first prepared_heads.
__device__ void find_rows(const BackwardRowsParams& params, SequenceInfo& info, uint32_t& b, RowGroup& at) {
  const uint32_t heads = params.prepared_heads, num_heads = params.problem.forward.num_heads;
  const uint32_t group = blockIdx.x / heads, all_heads = blockIdx.x - group * heads;
  b = all_heads / num_heads;
  info = sequence_info(params.problem.forward, b);
  at = row_group(params, info, b, all_heads - b * num_heads, group);
}

/// The same of the first prepared_tiles: those beside the keys of a tile, of each of its heads. False: no such tile.
__device__ bool find_rows_beside(const BackwardRowsParams& params, SequenceInfo& info, uint32_t& b, RowGroup& at) {
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
__device__ void clear(const BackwardRowsParams& params) {
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < params.num_cleared; i += threads) {
    params.cleared[i] = uint4{};
  }
}

/// One CTA: kRows query rows of a head; kDqColumns / 8 lanes a row.
template <typename Element, int kDqColumns>
__global__ void __launch_bounds__(kThreads) prepare_rows_kernel(const __grid_constant__ BackwardRowsParams params) {
  constexpr int kLanes = kDqColumns / 8, kRowsAtOnce = kThreads / kLanes, kPasses = kRows / kRowsAtOnce;
  constexpr int kInFlight = kPasses < 4 ? kPasses : 4;  // so that registers allow three CTAs an SM
  grid_launch_dependents();
  clear(params);
  const ForwardParams& p = params.problem.forward;
  SequenceInfo info;
  RowGroup at;
  uint32_t b;
  if (params.prepared_tiles > 0) {
    if (!find_rows_beside(params, info, b, at)) return;
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
  if (lane >= kPasses) return;
  params.statistics[accum_row + own_row] =
      row_statistics<Element>(lse, delta - dlse, 1.f / static_cast<float>(p.softmax_scale));
}

/// One CTA: two 64 x 64 tiles of dq_accum (backward_tile.h), by way of shared memory to whole rows.
template <typename Element>
__global__ void __launch_bounds__(kThreads) store_dq_kernel(const __grid_constant__ BackwardRowsParams params) {
  constexpr int kPadded = 64 + 8;  // 16-bit elements; rows then start in different banks
  __shared__ __align__(16) uint16_t tiles[2][64][kPadded];
  const ForwardParams& p = params.problem.forward;
  const int tiles_per_block = params.block_m * params.dq_columns / kDqTile, pairs = tiles_per_block / 2;
  const uint32_t heads = p.num_heads, per_sequence = heads * params.num_m_blocks * pairs;
  const uint32_t b = blockIdx.x / per_sequence, in_sequence = blockIdx.x - b * per_sequence;
  const uint32_t m_block = in_sequence / (heads * pairs), head = (in_sequence - m_block * heads * pairs) / pairs;
  const SequenceInfo info = sequence_info(p, b);
  const int64_t block_row = int64_t{m_block} * params.block_m;
  grid_dependency_wait();
  if (block_row >= info.seqlen_q_padded) return;

  const int tile = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int first_tile = in_sequence % pairs * 2;
  const int64_t block =
      int64_t{head} * params.num_blocks + first_block(p, info, b, params.block_m, params.num_m_blocks) + m_block;
  const float4* const accum = reinterpret_cast<const float4*>(
      params.dq_accum + (block * tiles_per_block + first_tile + tile) * kDqTile + warp * (kDqTile / 4));
  const float scale = params.dq_scale;
  // Where no tile has stored anything, because no row sees a key, dq_accum is undefined.
  const int64_t block_end = block_row + params.block_m < info.seqlen_q ? block_row + params.block_m : info.seqlen_q;
  const Range seen = visible_columns(p, info, block_row, block_end);
  const bool defined = block_row < block_end && seen.begin < seen.end;
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
__device__ void add_key_parts(const TensorView& parts, const TensorView& sum, int num_parts, uint32_t columns,
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

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    add_key_parts_kernel(const __grid_constant__ BackwardKeyPartsParams params) {
  const ForwardParams& p = params.problem.forward;
  const uint32_t groups = (static_cast<uint32_t>(p.seqlen_k) + kKeyRows - 1) / kKeyRows, heads = p.num_heads_k;
  const uint32_t all_groups = blockIdx.x / heads, head = blockIdx.x - all_groups * heads, b = all_groups / groups;
  const SequenceInfo info = sequence_info(p, b);
  const int64_t first = int64_t{all_groups - b * groups} * kKeyRows;
  const int64_t rows = info.seqlen_k_padded - first < kKeyRows ? info.seqlen_k_padded - first : kKeyRows;
  grid_dependency_wait();
  if (rows <= 0) return;
  const int64_t batch = p.cu_seqlens_k != nullptr ? 0 : b, row = info.k_row + first;
  const bool is_dk = blockIdx.y == 0;
  add_key_parts<Element>(is_dk ? params.dk_parts : params.dv_parts, is_dk ? params.problem.dk : params.problem.dv,
                         params.num_parts, is_dk ? p.head_dim : p.head_dim_v, batch, row, rows, head);
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

template <typename Element>
void launch_prepare(const BackwardRowsParams& params, cudaStream_t stream) {
  const ForwardParams& p = params.problem.forward;
  const PackedBlocksParams& packed = params.packed_blocks;
  const int64_t groups = params.prepared_tiles > 0
                             ? params.prepared_tiles * (p.num_heads / packed.heads) * (packed.block_n / kRows)
                             : params.prepared_heads * params.num_m_blocks * (params.block_m / kRows);
  const auto kernel = params.dq_columns == 64    ? prepare_rows_kernel<Element, 64>
                      : params.dq_columns == 128 ? prepare_rows_kernel<Element, 128>
                                                 : prepare_rows_kernel<Element, 256>;
  kernel<<<static_cast<unsigned>(groups), kThreads, 0, stream>>>(params);
  check(cudaGetLastError(), "backward statistics");
}

}  // namespace

void launch_prepare_rows(const BackwardRowsParams& params, cudaStream_t stream) {
  const ForwardParams& p = params.problem.forward;
  if (p.is_varlen_q() || p.is_varlen_k()) {
    clear_gaps_kernel<<<static_cast<unsigned>(std::min<int64_t>(p.batch + 1, 128)), kThreads, 0, stream>>>(
        params.problem, params.packed_blocks);
    check(cudaGetLastError(), "clearing gradients");
  }
  p.dtype == DType::kBFloat16 ? launch_prepare<__nv_bfloat16>(params, stream) : launch_prepare<__half>(params, stream);
}

void launch_add_key_parts(const BackwardKeyPartsParams& params, cudaStream_t stream) {
  const ForwardParams& p = params.problem.forward;
  const int64_t ctas = p.batch * ((p.seqlen_k + kKeyRows - 1) / kKeyRows) * p.num_heads_k;
  const auto kernel = p.dtype == DType::kBFloat16 ? add_key_parts_kernel<__nv_bfloat16> : add_key_parts_kernel<__half>;
  launch_dependent(kernel, dim3(static_cast<unsigned>(ctas), 2), kThreads, 0, stream, params, "backward dk dv");
}

void launch_store_dq(const BackwardRowsParams& params, cudaStream_t stream) {
  const ForwardParams& p = params.problem.forward;
  const int64_t pairs = int64_t{params.block_m} * params.dq_columns / (2 * kDqTile);
  const int64_t ctas = p.batch * p.num_heads * params.num_m_blocks * pairs;
  const auto kernel = p.dtype == DType::kBFloat16 ? store_dq_kernel<__nv_bfloat16> : store_dq_kernel<__half>;
  launch_dependent(kernel, dim3(static_cast<unsigned>(ctas)), kThreads, 0, stream, params, "backward dq");
}

}  // namespace flash_attn::sm90
