// Which kernels there is code for on which GPU: what the compiler leaves out and what the planner does not choose.
#pragma once

namespace flash_attn::cuda::sm80 {

/// Of shared memory, in bytes, that tiles of a block may take. `arch` is a compute capability times 10, as
/// __CUDA_ARCH__.
constexpr int max_tile_bytes(int arch) {
  return arch == 860 || arch == 890 || arch >= 1200 ? 99 << 10 : arch < 900 ? 163 << 10 : 227 << 10;
}

/// On compute capability 10 ptxas spills registers of the largest tiles: the next smaller ones serve there.
constexpr bool has_code(int arch, int head_dim, int block_n, int block_m, bool extended, int bytes) {
  const bool largest_extended =
      extended && block_n == 128 && ((head_dim == 64 && block_m == 128) || (head_dim == 128 && block_m == 64));
  const bool spills = arch / 100 == 10 && (largest_extended || (head_dim == 192 && block_m == 128));
  return bytes <= max_tile_bytes(arch) && !spills;
}

}  // namespace flash_attn::cuda::sm80
