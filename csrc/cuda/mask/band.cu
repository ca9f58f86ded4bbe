#include "../common/dependent_launch.h"
#include "../common/launch.h"
#include "../common/tiles/visibility.h"
#include "band.h"
#include "band_part.h"

namespace flash_attn::cuda::mask {
namespace {

constexpr int kWarps = kClassRows / kCellRows;  // of a block: the row cells of a word of classes
// Of a row cell, 16 rows: each end of a band runs through 79 columns at most, which lie in three cells.
constexpr int kMostPartialCells = 6;
constexpr int kAhead = 4;  // times 32 cells whose classes are loaded at once

struct BandArguments {
  PackedMask packed;
  MaskKind* kind;
  uint32_t mark;
  int rows, cols;
};

/// How many scores of rows x cols lie on diagonals before this one: row r has clamp(r + diagonal, 0, cols).
__device__ int64_t scores_before(int64_t diagonal, int64_t rows, int64_t cols) {
  const auto before = [&](int64_t n) {  // numbers below n, each clamped
    return n <= 0 ? 0 : n <= cols ? n * (n - 1) / 2 : cols * (cols - 1) / 2 + (n - cols) * cols;
  };
  return before(rows + diagonal) - before(diagonal);
}

/// By a warp: the cell's bits.
__device__ void add_partial_cell(const BandArguments& arguments, int row_cell, int col_cell, SeenScores& seen) {
  const int lane = int(threadIdx.x) % 32;
  const uint32_t bits = __ldg(arguments.packed.bits + arguments.packed.cell(0, 0, row_cell, col_cell) * 32 + lane);
  const int diagonal = col_cell * kCellCols + 2 * (lane % 4) - (row_cell * kCellRows + lane / 4);
#pragma unroll 1
  for (uint32_t left = bits; left != 0; left &= left - 1) {  // see PackedMask::bits
    const int bit = __ffs(int(left)) - 1, at = diagonal + bit / 4 * 8 + bit % 2 - bit / 2 % 2 * 8;
    seen.add(at, at, 1);
  }
}

/// By a warp: 16 rows. False: they are not those of a band. `denied`: nor are others.
__device__ bool add_row_cell(const BandArguments& arguments, int row_cell, int denied, SeenScores& seen) {
  const PackedMask& packed = arguments.packed;
  const int lane = int(threadIdx.x) % 32;
  const int row = row_cell * kCellRows, rows = min(kCellRows, arguments.rows - row);
  const uint8_t* const classes =
      reinterpret_cast<const uint8_t*>(packed.classes + int64_t{row_cell / kWarps} * packed.col_cells) +
      row_cell % kWarps;
  int partial_cells = 0;
#pragma unroll 1
  for (int first = 0; first < packed.col_cells; first += 32 * kAhead) {
    uint32_t kinds[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int col_cell = first + 32 * i + lane;
      kinds[i] = col_cell < packed.col_cells ? __ldg(classes + int64_t{col_cell} * 8) : 0;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int col = (first + 32 * i + lane) * kCellCols;
      // Of two rows a band's diagonals pass from any cell to the next.
      const uint32_t before = __shfl_up_sync(~0u, kinds[i], 1);
      const bool ends = rows > 1 && lane > 0 &&
                        ((before == kSeen && kinds[i] == kHidden) || (before == kHidden && kinds[i] == kSeen));
      if (__any_sync(~0u, ends || (kinds[i] & kBiased) != 0 || denied != 0)) return false;
      if (kinds[i] == kSeen) {
        const int cols = min(kCellCols, arguments.cols - col);
        seen.add(col - (row + rows - 1), col + cols - 1 - row, unsigned(rows * cols));
      }
      uint32_t partial = __ballot_sync(~0u, kinds[i] == (kSeen | kHidden));
      partial_cells += __popc(partial);
      if (partial_cells > kMostPartialCells) return false;
      for (; partial != 0; partial &= partial - 1) {
        add_partial_cell(arguments, row_cell, first + 32 * i + __ffs(int(partial)) - 1, seen);
      }
    }
  }
  return true;
}

__device__ void reduce(SeenScores& seen) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    seen.first = min(seen.first, __shfl_xor_sync(~0u, seen.first, distance));
    seen.last = max(seen.last, __shfl_xor_sync(~0u, seen.last, distance));
    seen.count += __shfl_xor_sync(~0u, seen.count, distance);
  }
}

/// By one thread, of a whole block; the last one says what has come out.
__device__ void add_block(const BandArguments& arguments, BandPart& part, const SeenScores& seen) {
  atomicMin(&part.seen.first, seen.first);
  atomicMax(&part.seen.last, seen.last);
  atomicAdd(&part.seen.count, seen.count);
  __threadfence();
  if (atomicAdd(&part.blocks, 1) != int(gridDim.x) - 1) return;
  __threadfence();
  const int first = __ldcg(&part.seen.first), last = __ldcg(&part.seen.last);
  const int64_t rows = arguments.rows, cols = arguments.cols;
  const int64_t all =
      first <= last ? scores_before(int64_t{last} + 1, rows, cols) - scores_before(first, rows, cols) : -1;
  part.left = first <= 1 - rows ? -kUnbounded : first;
  part.right = last >= cols - 1 ? kUnbounded : last;
  // Keys that nobody sees may hold NaN, which kernels of bands do not expect.
  const bool all_rows_see = last >= 0 && first <= cols - rows, all_columns_seen = first <= 0 && last >= cols - rows;
  part.is_band = int64_t(__ldcg(&part.seen.count)) == all && all_rows_see && all_columns_seen ? 1 : 0;
  if (part.is_band != 0) part.band_or_biased = arguments.mark;
}

/// Adds to what pack() has started. A block that knows that the mask is no band leaves at once, and as it does not add
/// its part, no block is the last one: it remains no band.
__global__ void __launch_bounds__(32 * kWarps) find_band_kernel(const __grid_constant__ BandArguments arguments) {
  __shared__ SeenScores of_warps[kWarps];
  grid_launch_dependents();
  grid_dependency_wait();  // for the packed mask
  BandPart& part = *static_cast<BandPart*>(arguments.kind);
  // Before it adds its part; the last block says so if it is a band. What a graph has left there is no more.
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    part.band_or_biased = __ldcg(&part.biased) == arguments.mark ? arguments.mark : ~arguments.mark;
  }
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, row_cell = int(blockIdx.x) * kWarps + warp;
  const int denied = __ldcg(&part.denied);
  SeenScores seen;
  const bool possible =
      row_cell < arguments.packed.row_cells ? add_row_cell(arguments, row_cell, denied, seen) : denied == 0;
  if (!__syncthreads_and(possible)) return;
  reduce(seen);
  if (lane == 0) of_warps[warp] = seen;
  __syncthreads();
  if (warp > 0) return;
  seen = of_warps[lane % kWarps];
  if (lane >= kWarps) seen.count = 0;
  reduce(seen);
  if (lane == 0) add_block(arguments, part, seen);
}

/// Of a mask that pack() has just packed.
void find_band(const MaskView& view, const PackedMask& packed, MaskKind* kind, uint32_t mark, cudaStream_t stream) {
  const BandArguments arguments{packed, kind, mark, int(view.row_size), int(view.col_size)};
  launch_dependent(find_band_kernel, dim3(unsigned(row_groups(view))), 32 * kWarps, 0, stream, arguments,
                   "band of a mask");
}

KnownMask pack_and_mark(const MaskView& view, void* data, uint32_t mark, bool looks, cudaStream_t stream) {
  MaskKind* const kind = place_kind(view, data);
  looks = looks && has_band(view);
  const KnownMask known{pack(view, data, stream, {kind, mark, looks}), kind, mark};
  if (looks) find_band(view, known.packed, kind, mark, stream);
  return known;
}

}  // namespace

KnownMask pack_with_kind(const MaskView& view, void* workspace, cudaStream_t stream, bool looks) {
  if (view.packed != nullptr) return {place_packed(view, view.packed), place_kind(view, view.packed), kPreparedMark};
  // Scattered: memory holds small numbers by chance.
  const uint64_t scattered = new_launch_id() * 0x9e3779b97f4a7c15ull;
  return pack_and_mark(view, workspace, static_cast<uint32_t>(scattered >> 32), looks, stream);
}

void prepare(const MaskView& view, void* data, cudaStream_t stream) {
  check(cudaMemsetAsync(place_kind(view, data), 0, kKindBytes, stream), "kind of a mask");
  pack_and_mark(view, data, kPreparedMark, true, stream);
}

}  // namespace flash_attn::cuda::mask
