// Which kernels of the family there is code for, on which GPU: what the build has, what the compiler leaves out, and so
// what the planners do not choose.
#pragma once

#include <cstdlib>

namespace flash_attn::cuda::sm80 {

/// Whose code of `archs` a GPU runs, as CMAKE_CUDA_ARCHITECTURES, with spaces: "80-real 90-real 120"; 0: none is for
/// it. Machine code runs on its own and on later minor versions, PTX ("-virtual", or a number alone, which is both) on
/// everything later; but PTX of 8.x is not taken: it is slow to compile, and has nothing of what came with 9.0.
inline int code_arch(int compute_capability, const char* archs) {
  int best = 0;
  for (const char* at = archs; *at != '\0';) {
    char* end = nullptr;
    const int arch = int(std::strtol(at, &end, 10));
    const bool has_ptx = !(end[0] == '-' && end[1] == 'r') && arch >= 90;
    const bool runs = arch <= compute_capability && (has_ptx || arch / 10 == compute_capability / 10);
    if (runs && arch > best) best = arch;
    for (at = end; *at != '\0' && *at != ' ';) ++at;
    if (*at == ' ') ++at;
  }
  return best;
}

inline bool has_code_for(int compute_capability, const char* archs) {
  return code_arch(compute_capability, archs) != 0;
}

/// Kinds of GPUs, by the shared memory of a block: what a kernel is for, so that the others' code does without it.
enum Gpus : unsigned {
  kGpus99Kb = 1,   // 8.6, 8.9, 12.x
  kGpus163Kb = 2,  // 8.0, 8.7
  kGpus90 = 4,     // 227 KB
  kGpus100 = 8,    // likewise; but ptxas spills registers of the largest tiles for masks and scores
  kGpus227Kb = kGpus90 | kGpus100,
  kAllGpus = kGpus99Kb | kGpus163Kb | kGpus227Kb,
};

/// Whose kernels there are in the code of an architecture, a compute capability times 10, as __CUDA_ARCH__. What is
/// compiled for 8.0 runs on 8.6 and 8.9 as well. With FLASH_ATTN_ALL_TILES: everybody's, to test them on one GPU.
constexpr unsigned gpus_of_code(int arch) {
  if (arch >= 1000 && arch < 1200) return kGpus100;
#ifdef FLASH_ATTN_ALL_TILES
  return kAllGpus;
#else
  return arch >= 1200  ? kGpus99Kb
         : arch >= 900 ? kGpus90
         : arch == 800 ? kGpus163Kb | kGpus99Kb
         : arch == 870 ? kGpus163Kb
                       : kGpus99Kb;
#endif
}

}  // namespace flash_attn::cuda::sm80
