#include "shared_memory.h"

#include <cuda_runtime_api.h>

#include <vector>

#include "check.h"

namespace flash_attn::cuda {

void allow_shared_bytes(const void* kernel, int bytes, const char* what) {
  struct Allowed {
    const void* kernel;
    int device, bytes;
  };
  static thread_local std::vector<Allowed> allowed;  // as many as a program has kinds of calls
  int device = 0;
  check(cudaGetDevice(&device), what);
  for (const Allowed& a : allowed) {
    if (a.kernel == kernel && a.device == device && a.bytes >= bytes) return;
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
  allowed.push_back({kernel, device, bytes});
}

}  // namespace flash_attn::cuda
