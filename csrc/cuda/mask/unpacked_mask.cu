#include "../common/launch.h"
#include "unpacked_mask.h"

namespace flash_attn::cuda::mask {
namespace {

constexpr int kThreads = 256;

struct UnpackArguments {
  MaskView view;
  PackedMask packed;
  uint8_t* to;  // contiguous
  int64_t count, first_block;
};

__global__ void __launch_bounds__(kThreads) unpack_kernel(const __grid_constant__ UnpackArguments arguments) {
  const int64_t index = (arguments.first_block + blockIdx.x) * kThreads + threadIdx.x;
  if (index >= arguments.count) return;
  const MaskView& view = arguments.view;
  const int64_t col = index % view.col_size, above = index / view.col_size;
  const int64_t row = above % view.row_size, slice = above / view.row_size;
  arguments.to[index] = arguments.packed.sees(slice / view.head_size, slice % view.head_size, row, col) ? 1 : 0;
}

}  // namespace

MaskView unpack(const MaskView& view, void* data, cudaStream_t stream) {
  const int64_t count = unpacked_bytes(view);
  if (count == 0) return view;
  const UnpackArguments arguments{view, place_packed(view, view.packed), static_cast<uint8_t*>(data), count, 0};
  cuda::launch_blocks(unpack_kernel, arguments, units(count, kThreads), kThreads, 0, stream, "mask unpacking");
  MaskView unpacked = view;
  unpacked.data = data;
  unpacked.packed = nullptr;
  const auto stride = [](int64_t size, int64_t step) { return size == 1 ? 0 : step; };
  unpacked.col = stride(view.col_size, 1);
  unpacked.row = stride(view.row_size, view.col_size);
  unpacked.head = stride(view.head_size, view.row_size * view.col_size);
  unpacked.batch = stride(view.batch_size, view.head_size * view.row_size * view.col_size);
  return unpacked;
}

}  // namespace flash_attn::cuda::mask
