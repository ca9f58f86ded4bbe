// Which kernels of the family there is code for, on which GPU: what the build has, what the compiler leaves out, and so
// what the planners do not choose.
#pragma once

#include <cstdlib>

namespace flash_attn::cuda::sm80 {

/// Whether a GPU can run what was compiled for `archs`, as CMAKE_CUDA_ARCHITECTURES, with spaces: "80-real 90-real
/// 120". Machine code runs on its own and on later minor versions, PTX ("-virtual", or a number alone, which is both)
/// on everything later; but PTX of 8.x leaves out kernels that need more shared memory than those GPUs have.
inline bool has_code_for(int compute_capability, const char* archs) {
  for (const char* at = archs; *at != '\0';) {
    char* end = nullptr;
    const int arch = int(std::strtol(at, &end, 10));
    const bool has_ptx = !(end[0] == '-' && end[1] == 'r') && arch >= 90;
    if (arch > 0 && arch <= compute_capability && (has_ptx || arch / 10 == compute_capability / 10)) return true;
    for (at = end; *at != '\0' && *at != ' ';) ++at;
    if (*at == ' ') ++at;
  }
  return false;
}

/// Of shared memory, in bytes, that tiles of a backward block may take. `arch` is a compute capability times 10, as
/// __CUDA_ARCH__.
constexpr int max_tile_bytes(int arch) {
  return arch == 860 || arch == 890 || arch >= 1200 ? 99 << 10 : arch < 900 ? 163 << 10 : 227 << 10;
}

/// Backward. On compute capability 10 ptxas spills registers of the largest tiles: the next smaller ones serve there.
constexpr bool has_code(int arch, int head_dim, int block_n, int block_m, bool extended, int bytes) {
  const bool largest_extended =
      extended && block_n == 128 && ((head_dim == 64 && block_m == 128) || (head_dim == 128 && block_m == 64));
  const bool spills = arch / 100 == 10 && (largest_extended || (head_dim == 192 && block_m == 128));
  return bytes <= max_tile_bytes(arch) && !spills;
}

}  // namespace flash_attn::cuda::sm80
