#include "../../sequence.h"
#include "../common/launch.h"
#include "is_seen.h"
#include "packed_mask.h"

namespace flash_attn::cuda::mask {
namespace {

constexpr int kWarps = 8;

struct PackArguments {
  MaskView view;
  PackedMask packed;
  int64_t first_block, num_cells;
};

/// A warp packs a cell. Lane 4 g + t reads rows g and g + 8, columns 8 n + 2 t and the next.
template <typename Storage>
__global__ void __launch_bounds__(32 * kWarps) pack_kernel(const __grid_constant__ PackArguments arguments) {
  int64_t cell = (arguments.first_block + blockIdx.x) * kWarps + threadIdx.x / 32;
  if (cell >= arguments.num_cells) return;
  const int64_t number = cell;
  const int lane = int(threadIdx.x) % 32;
  const MaskView& view = arguments.view;
  const PackedMask& packed = arguments.packed;
  const int64_t col = cell % packed.col_cells * kCellCols + 2 * (lane % 4);
  cell /= packed.col_cells;
  const int64_t row = cell % packed.row_cells * kCellRows + lane / 4;
  cell /= packed.row_cells;
  const Storage* const data = static_cast<const Storage*>(view.data) + cell % view.head_size * view.head +
                              cell / view.head_size * view.batch + row * view.row + col * view.col;
  uint32_t bits = 0;
#pragma unroll 2
  for (int n = 0; n < kCellCols / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2 * 8, c = 8 * n + i % 2;
      // A broadcast row or column stands for all; its stride is 0.
      const bool exists =
          (view.row_size == 1 || row + r < view.row_size) && (view.col_size == 1 || col + c < view.col_size);
      const bool seen = exists && is_seen(data[r * view.row + c * view.col]);
      bits |= uint32_t(seen) << (4 * n + i);
    }
  }
  if (packed.bits != nullptr) packed.bits[number * 32 + lane] = bits;
  // Over the eight lanes of the same columns, then over the four pairs of columns.
  uint32_t any = bits | bits >> 2;  // bits 4 n and 4 n + 1: of columns 8 n + 2 t, 8 n + 2 t + 1
  any |= __shfl_xor_sync(~0u, any, 4);
  any |= __shfl_xor_sync(~0u, any, 8);
  any |= __shfl_xor_sync(~0u, any, 16);
  uint64_t seen = 0;
#pragma unroll
  for (int n = 0; n < kCellCols / 8; ++n) seen |= uint64_t(any >> (4 * n) & 3) << (8 * n + 2 * (lane % 4));
  seen |= __shfl_xor_sync(~0u, seen, 1);
  seen |= __shfl_xor_sync(~0u, seen, 2);
  if (lane == 0) packed.seen[number] = seen;
}

int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }
int64_t row_cells(const MaskView& view) { return ceil_div(view.row_size, kCellRows); }
int64_t col_cells(const MaskView& view) { return ceil_div(view.col_size, kCellCols); }

}  // namespace

int64_t num_cells(const MaskView& view) { return view.batch_size * view.head_size * row_cells(view) * col_cells(view); }

int64_t packed_bytes(const MaskView& view, bool with_bits) {
  const int64_t cells = num_cells(view);
  return aligned(cells * int64_t(sizeof(uint64_t))) + (with_bits ? aligned(cells * 32 * int64_t(sizeof(uint32_t))) : 0);
}

PackedMask place_packed(const MaskView& view, bool with_bits, void* workspace) {
  PackedMask packed;
  packed.seen = static_cast<uint64_t*>(workspace);
  if (with_bits) {
    packed.bits = reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) +
                                              aligned(num_cells(view) * int64_t(sizeof(uint64_t))));
  }
  packed.row_cells = int(row_cells(view));
  packed.col_cells = int(col_cells(view));
  packed.row_step = view.row_size == 1 ? 0 : 1;
  packed.col_step = view.col_size == 1 ? 0 : 1;
  const int64_t cells = int64_t{packed.row_cells} * packed.col_cells;
  packed.head = view.head_size == 1 ? 0 : cells;
  packed.batch = view.batch_size == 1 ? 0 : cells * view.head_size;
  return packed;
}

void pack(const MaskView& view, const PackedMask& packed, cudaStream_t stream) {
  const PackArguments arguments{view, packed, 0, num_cells(view)};
  auto* kernel = view.dtype == DType::kBool       ? pack_kernel<uint8_t>
                 : view.dtype == DType::kFloat32  ? pack_kernel<float>
                 : view.dtype == DType::kBFloat16 ? pack_kernel<__nv_bfloat16>
                                                  : pack_kernel<__half>;
  cuda::launch_blocks(kernel, arguments, ceil_div(arguments.num_cells, kWarps), 32 * kWarps, 0, stream, "mask packing");
}

}  // namespace flash_attn::cuda::mask
