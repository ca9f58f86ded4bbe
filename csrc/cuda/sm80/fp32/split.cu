#include "../../common/launch.h"
#include "../backward/schedule/place.h"
#include "pair.h"
#include "split.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxColumns = 256;
constexpr int kMinExponent = 14 - 58, kMaxExponent = 100;
constexpr uint32_t kAbsolute = 0x7fffffffu;

struct SplitParams {
  ForwardParams problem;
  SplitSource sources[kMaxSources];
  bool whole[kMaxSources];         // rows consist of whole, aligned pieces of 16 bytes
  int64_t end_block[kMaxSources];  // of the launch: of this source and those before
  int count;
  int* flags;
  int64_t first_block;
};

/// A tile of 64 rows of one head; kLanes lanes have four columns each of a row.
struct SplitTile {
  int batch, head, row, rows;  // rows that take part
  int64_t first_row;           // of the sequence, in packed ones
  bool packed;
};

/// False: there are no such rows.
SM80_DEVICE bool find_tile(const ForwardParams& p, const SplitSource& source, int64_t index, SplitTile& tile) {
  const int32_t* const starts = source.queries ? p.cu_seqlens_q : p.cu_seqlens_k;
  tile.packed = starts != nullptr;
  const int64_t tiles = source.planes.tiles, outer = index / tiles;
  BlockPlace place{int(outer / source.planes.heads), int(index - outer * tiles)};
  tile.head = int(outer % source.planes.heads);
  if (tile.packed) {
    place = find_packed_block(starts, source.queries ? p.total_q : p.total_k, int(p.batch), kTileRows, place.block);
  }
  if (place.block < 0) return false;
  const SequenceInfo sequence = sequence_info(p, place.batch);
  tile.batch = place.batch;
  tile.row = place.block * kTileRows;
  tile.first_row = tile.packed ? (source.queries ? sequence.q_row : sequence.k_row) : 0;
  tile.rows = int(min(int64_t{kTileRows}, (source.queries ? sequence.seqlen_q : sequence.seqlen_k) - tile.row));
  return tile.rows > 0;
}

SM80_DEVICE void load_columns(float (&x)[4], const float* from, int columns, bool whole) {
  if (whole && columns > 0) {
    const float4 v = __ldcs(reinterpret_cast<const float4*>(from));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    return;
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) x[c] = c < columns ? from[c] : 0.f;
}

SM80_DEVICE uint32_t magnitude(float x) { return __float_as_uint(x) & kAbsolute; }

/// Whether some of `count` maxima is not zero, but below 2^-16 of the largest.
SM80_DEVICE bool has_small(const uint32_t* maxima, int count, uint32_t largest) {
  bool any = false;
  for (int i = int(threadIdx.x); i < count; i += kThreads) {
    any = any || (maxima[i] != 0 && __uint_as_float(maxima[i]) * 0x1p16f < __uint_as_float(largest));
  }
  return any;
}

template <int kLanes>
__global__ void __launch_bounds__(kThreads) split_kernel(const __grid_constant__ SplitParams params) {
  constexpr int kStep = kThreads / kLanes, kRows = kTileRows / kStep;
  __shared__ uint32_t column_max[kMaxColumns], row_max[kTileRows];
  const int64_t index = params.first_block + blockIdx.x;
  int number = 0;
  while (index >= params.end_block[number]) ++number;
  const SplitSource& source = params.sources[number];
  SplitTile tile;
  if (!find_tile(params.problem, source, index - (number == 0 ? 0 : params.end_block[number - 1]), tile)) return;
  column_max[threadIdx.x] = 0;
  if (threadIdx.x < kTileRows) row_max[threadIdx.x] = 0;
  __syncthreads();  // the maxima are 0

  const int first = int(threadIdx.x) / kLanes, column = int(threadIdx.x) % kLanes * 4;
  const float* const from = static_cast<const float*>(source.view.data) +
                            row_offset(source.view, tile.packed, tile.batch, tile.first_row + tile.row, tile.head) +
                            column;
  float x[kRows][4];
  uint32_t of_column[4] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first + i * kStep;
    load_columns(x[i], from + row * source.view.row, row < tile.rows ? source.columns - column : 0,
                 params.whole[number]);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    uint32_t of_row = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      of_row = max(of_row, magnitude(x[i][c]));
      of_column[c] = max(of_column[c], magnitude(x[i][c]));
    }
#pragma unroll
    for (int distance = min(kLanes, 32) / 2; distance > 0; distance /= 2) {
      of_row = max(of_row, __shfl_xor_sync(~0u, of_row, distance));
    }
    if (threadIdx.x % min(kLanes, 32) == 0) atomicMax(row_max + first + i * kStep, of_row);
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (column + c < source.columns) atomicMax(column_max + column + c, of_column[c]);
  }
  __syncthreads();  // the maxima are there

  const uint32_t largest =
      __reduce_max_sync(~0u, max(row_max[threadIdx.x % 32], row_max[threadIdx.x % 32 + kTileRows / 2]));
  int exponent = largest == 0 ? 0 : 14 + 127 - int(largest >> 23);
  bool bad = largest >> 23 == 255 || exponent > kMaxExponent || exponent < kMinExponent;
  if (bad) exponent = 0;
  if (source.tests_range) {
    bad = bad || has_small(row_max, kTileRows, largest) || has_small(column_max, source.columns, largest);
  }
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) {
    const int kv_head =
        source.queries ? tile.head / int(params.problem.num_heads / params.problem.num_heads_k) : tile.head;
    if (bad) params.flags[int64_t{tile.batch} * params.problem.num_heads_k + kv_head] = 1;
    source.planes.head_units(tile.packed, tile.batch, tile.first_row, tile.head)[tile.row / kTileRows] =
        __uint_as_float(uint32_t(127 - exponent) << 23);
  }
  if (column >= source.planes.columns) return;
  const float factor = __uint_as_float(uint32_t(127 + exponent) << 23);
  __half* const to = source.planes.head_data(tile.packed, tile.batch, tile.first_row, tile.head) +
                     int64_t{tile.row} * (2 * source.planes.columns) + column;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first + i * kStep;
    if (row >= tile.rows) break;
    uint32_t high[2], low[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      split_pair(x[i][2 * c] * factor, x[i][2 * c + 1] * factor, high[c], low[c]);
    }
    __half* const at = to + int64_t{row} * (2 * source.planes.columns);
    *reinterpret_cast<uint2*>(at) = {high[0], high[1]};
    *reinterpret_cast<uint2*>(at + source.planes.columns) = {low[0], low[1]};
  }
}

}  // namespace

void split(const ForwardParams& problem, const SplitSource* sources, int count, int* flags, cudaStream_t stream) {
  cuda::check(cudaMemsetAsync(flags, 0, size_t(problem.batch * problem.num_heads_k) * sizeof(int), stream),
              "sm80 fp32 flags");
  SplitParams params{problem, {}, {}, {}, count, flags, 0};
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    const SplitSource& source = params.sources[i] = sources[i];
    const bool packed = (source.queries ? problem.cu_seqlens_q : problem.cu_seqlens_k) != nullptr;
    blocks += (packed ? 1 : problem.batch) * source.planes.heads * source.planes.tiles;
    params.end_block[i] = blocks;
    params.whole[i] = reinterpret_cast<uintptr_t>(source.view.data) % 16 == 0 && source.columns % 4 == 0 &&
                      source.view.batch % 4 == 0 && source.view.row % 4 == 0 && source.view.head % 4 == 0;
  }
  const int columns = sources[0].planes.columns;
  auto* const kernel = columns <= 16    ? split_kernel<4>
                       : columns <= 32  ? split_kernel<8>
                       : columns <= 64  ? split_kernel<16>
                       : columns <= 128 ? split_kernel<32>
                                        : split_kernel<64>;
  cuda::launch_blocks(kernel, params, blocks, kThreads, 0, stream, "sm80 fp32 split");
}

}  // namespace flash_attn::cuda::sm80::fp32
