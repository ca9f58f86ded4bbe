// Whether this library holds code of the family that a GPU can run.
#pragma once

#include <cstdlib>

namespace flash_attn::cuda::sm80 {

/// `archs` as CMAKE_CUDA_ARCHITECTURES, with spaces: "80-real 90-real 120". Machine code runs on its own and on later
/// minor versions, PTX ("-virtual", or a number alone, which is both) on everything later; but PTX of 8.x leaves out
/// kernels that need more shared memory than those GPUs have.
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

}  // namespace flash_attn::cuda::sm80
