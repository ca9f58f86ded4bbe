// What the kernels on tiles need to know of attn_mask ahead: which blocks of scores it hides wholly, so that they are
// passed over; and a mask of bools as bits in the order of transposed fragments, a word a lane. It is read once.
#include "../../common/launch.h"
#include "../../common/scores.h"
#include "../../mask/is_seen.h"
#include "rows.h"

namespace flash_attn::cuda::sm80 {
namespace {

using mask::is_seen;

constexpr int kThreads = 256, kWarps = kThreads / 32, kCell = MaskCells::kCell;

struct CellParams {
  MaskView mask;
  int block_m, block_n, m_blocks, n_blocks;  // of scores
  int query_cells, key_cells;
  int* visible;
  uint32_t* bits;  // null: not wanted
  int64_t num_cells, first_block;
};

/// A warp reads a cell; neighbours are of neighbouring keys.
template <typename Storage>
__global__ void __launch_bounds__(kThreads) read_cells_kernel(const __grid_constant__ CellParams params) {
  const int64_t cell = (params.first_block + blockIdx.x) * kWarps + threadIdx.x / 32;
  if (cell >= params.num_cells) return;
  const int lane = int(threadIdx.x) % 32;
  const int key_cell = int(cell % params.key_cells);
  const int query_cell = int(cell / params.key_cells % params.query_cells);
  const int64_t slice = cell / params.key_cells / params.query_cells;
  const MaskView& mask = params.mask;
  const int key = key_cell * kCell + lane / 4, query = query_cell * kCell + lane % 4 * 2;
  const Storage* const from = static_cast<const Storage*>(mask.data) + slice / mask.head_size * mask.batch +
                              slice % mask.head_size * mask.head + query * mask.row + key * mask.col;
  const bool all_rows = mask.row_size == 1, all_columns = mask.col_size == 1;
  uint32_t word = 0;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int q = 8 * n + i % 2, k = 16 * m + i / 2 * 8;
        if ((all_rows || query + q < mask.row_size) && (all_columns || key + k < mask.col_size)) {
          word |= uint32_t(is_seen(from[q * mask.row + k * mask.col])) << MaskCells::bit(m, n, i);
        }
      }
    }
  }
  if (params.bits != nullptr) {
    params.bits[((slice * params.key_cells + key_cell) * params.query_cells + query_cell) * 32 + lane] = word;
  }
  if (!__any_sync(~0u, word != 0) || lane != 0) return;
  const int m_block = query_cell * kCell / params.block_m, n_block = key_cell * kCell / params.block_n;
  params.visible[(slice * params.n_blocks + n_block) * params.m_blocks + m_block] = 1;  // all write the same
}

}  // namespace

void read_mask(const BackwardKernelParams& kernel, int* visible, uint32_t* bits, cudaStream_t stream) {
  const MaskView& mask = kernel.problem.forward.mask;
  CellParams params{};
  params.mask = mask;
  params.block_m = kernel.block_m, params.block_n = kernel.block_n;
  params.m_blocks = int(ceil_div(mask.row_size, kernel.block_m));
  params.n_blocks = int(ceil_div(mask.col_size, kernel.block_n));
  params.query_cells = int(ceil_div(mask.row_size, kCell)), params.key_cells = int(ceil_div(mask.col_size, kCell));
  params.visible = visible, params.bits = bits;
  const int64_t slices = mask.batch_size * mask.head_size;
  params.num_cells = slices * params.query_cells * params.key_cells;
  cuda::check(cudaMemsetAsync(visible, 0, size_t(slices * params.m_blocks * params.n_blocks) * sizeof(int), stream),
              "sm80 mask");
  auto* const kernel_of_type = mask.dtype == DType::kBool       ? read_cells_kernel<uint8_t>
                               : mask.dtype == DType::kFloat32  ? read_cells_kernel<float>
                               : mask.dtype == DType::kBFloat16 ? read_cells_kernel<__nv_bfloat16>
                                                                : read_cells_kernel<__half>;
  cuda::launch_blocks(kernel_of_type, params, ceil_div(params.num_cells, kWarps), kThreads, 0, stream, "sm80 mask");
}

}  // namespace flash_attn::cuda::sm80
