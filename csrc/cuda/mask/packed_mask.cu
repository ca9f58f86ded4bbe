#include "../common/division.h"
#include "../common/launch.h"
#include "band_part.h"
#include "packed_mask.h"
#include "sixteen_values.h"

namespace flash_attn::cuda::mask {
namespace {

constexpr int kWarps = 8;     // of a block: a word of classes
constexpr int kColCells = 4;  // of a warp, one after the other: 256 columns
static_assert(kWarps * kCellRows == kClassRows);

struct PackArguments {
  MaskView view;
  PackedMask packed;
  int64_t first_block;
  // A block's warps lie below each other, or, where the mask has one row of cells, beside each other.
  Divisor block_cols, block_rows;
  bool vectors;  // sixteen neighbouring values are aligned pieces of 16 bytes
  KindPlace place;

  __device__ BandPart& part() const { return *static_cast<BandPart*>(place.kind); }
};

/// Pairs of bits 2 t, 2 t + 1 of eight go to bits 0 and 1 of byte t.
__device__ __forceinline__ uint32_t spread_pairs(uint32_t x) {
  x = (x | x << 12) & 0x000f000fu;
  return (x | x << 6) & 0x03030303u;
}

/// Byte t of lane q of a quad becomes byte q of lane t.
__device__ __forceinline__ uint32_t transpose_bytes(uint32_t x, int lane) {
  const uint32_t other = __shfl_xor_sync(~0u, x, 1);
  x = __byte_perm(x, other, lane % 2 == 0 ? 0x6240 : 0x3715);
  const uint32_t far = __shfl_xor_sync(~0u, x, 2);
  return __byte_perm(x, far, lane % 4 < 2 ? 0x5410 : 0x3276);
}

/// A warp's cells. Lane 4 g + q reads columns 16 q to 16 q + 15 of rows g and g + 8.
template <typename Storage>
struct Packer {
  static constexpr int kAhead = sizeof(Storage) == 1 ? kColCells : sizeof(Storage) == 2 ? 2 : 1;  // loads before use

  const PackArguments& arguments;
  const MaskView& view;
  const PackedMask& packed;
  const int lane;
  const int64_t slice;  // batch entry and head
  const int row_cell, first_col_cell;
  const Storage* row[2];
  bool row_exists[2];
  bool denies_band = false, adds = false;  // something other than 0

  __device__ Packer(const PackArguments& all, int64_t of_slice, int of_row_cell, int of_col_cell)
      : arguments(all),
        view(all.view),
        packed(all.packed),
        lane(int(threadIdx.x) % 32),
        slice(of_slice),
        row_cell(of_row_cell),
        first_col_cell(of_col_cell) {
    const uint32_t head = uint32_t(slice) % uint32_t(view.head_size),
                   batch = uint32_t(slice) / uint32_t(view.head_size);
    const Storage* const data = static_cast<const Storage*>(view.data) + batch * view.batch + head * view.head;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // A broadcast row stands for all; its stride is 0.
      const int64_t number = row_cell * kCellRows + lane / 4 + 8 * r;
      row_exists[r] = view.row_size == 1 || number < view.row_size;
      row[r] = data + (row_exists[r] ? number * view.row : 0);
    }
  }

  /// One by one, those that exist; a broadcast column stands for all.
  __device__ void read(RowBits (&bits)[2], int64_t col) const {
#pragma unroll 2
    for (int i = 0; i < 16; ++i) {
      if (view.col_size != 1 && col + i >= view.col_size) break;
#pragma unroll
      for (int r = 0; r < 2; ++r) add_value(bits[r], i, row[r][(col + i) * view.col]);
    }
  }

  /// Sixteen columns from `col` on as bits: those that exist.
  __device__ uint32_t columns(int64_t col) const {
    const int64_t left = view.col_size == 1 ? 16 : view.col_size - col;
    return left >= 16 ? 0xffffu : left <= 0 ? 0u : (1u << left) - 1;
  }

  __device__ void store(int col_cell, RowBits (&bits)[2]) {
    uint32_t exists[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      exists[r] = row_exists[r] ? columns(int64_t{col_cell} * kCellCols + 16 * (lane % 4)) : 0;
      bits[r].seen &= exists[r];
      bits[r].biased &= exists[r];
    }
    const int64_t cell = (slice * packed.row_cells + row_cell) * packed.col_cells + col_cell;
    const uint32_t low = bits[0].seen, high = bits[1].seen;
    // Eight rows below and eight columns to the right lies the same diagonal.
    if (((low ^ high >> 8) & exists[0] & exists[1] >> 8 & 0xff) != 0) denies_band = true;
    const uint32_t pairs = spread_pairs(low & 0xff) | spread_pairs(high & 0xff) << 2 | spread_pairs(low >> 8) << 4 |
                           spread_pairs(high >> 8) << 6;
    packed.bits[cell * 32 + lane] = transpose_bytes(pairs, lane);

    uint32_t any = low | high;
    any |= __shfl_xor_sync(~0u, any, 4);
    any |= __shfl_xor_sync(~0u, any, 8);
    any |= __shfl_xor_sync(~0u, any, 16);
    if (lane < 4) reinterpret_cast<uint16_t*>(packed.seen + cell)[lane] = uint16_t(any);

    const bool seen = __any_sync(~0u, any != 0), biased = __any_sync(~0u, (bits[0].biased | bits[1].biased) != 0);
    const bool hidden = __any_sync(~0u, low != exists[0] || high != exists[1]);
    adds = adds || biased;
    if (lane == 0) store_class(col_cell, (seen ? kSeen : 0) | (hidden ? kHidden : 0) | (biased ? kBiased : 0));
  }

  /// Of a block, when it is through: many that say the same to one place stand in line.
  __device__ void tell_kind() const {
    const KindPlace& place = arguments.place;
    if (place.kind == nullptr) return;
    const bool biased = sizeof(Storage) > 1 && __syncthreads_or(adds) != 0;
    const bool denies = place.looks && __syncthreads_or(denies_band || adds) != 0;
    if (threadIdx.x != 0) return;
    if (biased) place.kind->biased = place.mark;
    if (denies) arguments.part().denied = 1;
  }

  /// Of booleans: a cell that is hidden, or seen, as a whole needs no bits to be made. False: it is neither.
  __device__ bool store_uniform(int col_cell, const SixteenValues<Storage> (&values)[2]) const {
    uint32_t any = values[0].any(), all = values[0].all();
    if (__any_sync(~0u, any != 0 && all != 0x01010101u)) return false;  // here most others end
    any |= values[1].any();
    all &= values[1].all();
    const bool hidden = __all_sync(~0u, any == 0);
    if (!hidden && !__all_sync(~0u, all == 0x01010101u)) return false;
    if ((row_cell + 1) * kCellRows > view.row_size && view.row_size != 1) return false;  // its last rows are not there
    const int64_t cell = (slice * packed.row_cells + row_cell) * packed.col_cells + col_cell;
    packed.bits[cell * 32 + lane] = hidden ? 0 : ~0u;
    if (lane == 0) {
      packed.seen[cell] = hidden ? 0 : ~uint64_t{0};
      store_class(col_cell, hidden ? kHidden : kSeen);
    }
    return true;
  }

  __device__ uint64_t* class_word(int col_cell) const {
    const int row_groups = (packed.row_cells + kWarps - 1) / kWarps;
    return packed.classes + (slice * row_groups + row_cell / kWarps) * packed.col_cells + col_cell;
  }

  __device__ void store_class(int col_cell, uint32_t of_cell) const {
    if (view.row_size == 1) {
      *class_word(col_cell) = of_cell * 0x0101010101010101ull;
    } else if (packed.row_cells == 1) {
      *class_word(col_cell) = of_cell;
    } else {
      reinterpret_cast<uint8_t*>(class_word(col_cell))[row_cell % kWarps] = uint8_t(of_cell);
    }
  }

  __device__ void run() {
    const int end = min(first_col_cell + kColCells, packed.col_cells);
    if (row_cell >= packed.row_cells) {  // the rest of a word of classes
      for (int c = first_col_cell; c < end; ++c) {
        if (lane == 0) store_class(c, 0);
      }
      return;
    }
    if (arguments.vectors && int64_t{first_col_cell + kColCells} * kCellCols <= view.col_size) {
#pragma unroll 1
      for (int c = first_col_cell; c < end; c += kAhead) {
        SixteenValues<Storage> values[kAhead][2];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
#pragma unroll
          for (int r = 0; r < 2; ++r) values[i][r].load(row[r] + (c + i) * kCellCols + 16 * (lane % 4));
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if constexpr (sizeof(Storage) == 1) {
            if (store_uniform(c + i, values[i])) continue;
          }
          RowBits bits[2] = {values[i][0].bits(), values[i][1].bits()};
          store(c + i, bits);
        }
      }
      return;
    }
#pragma unroll 1
    for (int c = first_col_cell; c < end; ++c) {
      RowBits bits[2];
      read(bits, int64_t{c} * kCellCols + 16 * (lane % 4));
      store(c, bits);
    }
  }
};

// Blocks an SM. Left to itself ptxas wants four, and of float32 spills a register on compute capability 10.
template <typename Storage>
constexpr int kLeastBlocks = sizeof(Storage) == 1 || sizeof(Storage) == 4 ? 3 : 0;

template <typename Storage>
__global__ void __launch_bounds__(32 * kWarps, kLeastBlocks<Storage>)
    pack_kernel(const __grid_constant__ PackArguments arguments) {
  const int warp = int(threadIdx.x) / 32;
  int rest = int(arguments.first_block + blockIdx.x), block_col, block_row;
  rest = arguments.block_cols.divide(rest, block_col);
  const int slice = arguments.block_rows.divide(rest, block_row);
  const bool one_row = arguments.packed.row_cells == 1;
  const int row_cell = one_row ? 0 : block_row * kWarps + warp;
  // What others have denied by then is said once more, or the look takes longer.
  if (arguments.place.looks && arguments.first_block + blockIdx.x == 0 && threadIdx.x == 0) arguments.part().start();
  Packer<Storage> packer(arguments, slice, row_cell, (one_row ? block_col * kWarps + warp : block_col) * kColCells);
  packer.run();
  packer.tell_kind();
}

template <typename Storage>
bool has_vectors(const MaskView& view) {
  const auto whole = [](int64_t stride) { return stride * int64_t(sizeof(Storage)) % 16 == 0; };
  return view.col == 1 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && whole(view.batch) && whole(view.head) &&
         whole(view.row);
}

template <typename Storage>
void launch(const MaskView& view, const PackedMask& packed, cudaStream_t stream, const KindPlace& place) {
  const bool one_row = packed.row_cells == 1;
  const int64_t cols = units(packed.col_cells, one_row ? kWarps * kColCells : kColCells);
  const int64_t rows = units(packed.row_cells, kWarps);
  const int64_t blocks = view.batch_size * view.head_size * rows * cols;
  if (blocks == 0) return;
  const PackArguments arguments{view, packed, 0, Divisor(cols), Divisor(rows), has_vectors<Storage>(view), place};
  cuda::launch_blocks(pack_kernel<Storage>, arguments, blocks, 32 * kWarps, 0, stream, "mask packing");
}

}  // namespace

PackedMask pack(const MaskView& view, void* data, cudaStream_t stream, const KindPlace& place) {
  const PackedMask packed = place_packed(view, data);
  switch (view.dtype) {
    case DType::kBool: launch<uint8_t>(view, packed, stream, place); break;
    case DType::kFloat64: launch<double>(view, packed, stream, place); break;
    case DType::kFloat32: launch<float>(view, packed, stream, place); break;
    case DType::kBFloat16: launch<__nv_bfloat16>(view, packed, stream, place); break;
    default: launch<__half>(view, packed, stream, place); break;
  }
  return packed;
}

}  // namespace flash_attn::cuda::mask
