#include "deterministic.h"

// The stable ABI has no word for torch's switch: these two are at::globalContext() and
// at::Context::deterministicAlgorithms() const, in libtorch_cpu. Weak: under a torch that has them no more they are
// null and the library still loads.
extern "C" {
__attribute__((weak)) const void* torch_global_context() __asm__("_ZN2at13globalContextEv");
__attribute__((weak)) bool torch_deterministic_algorithms(const void* context) __asm__(
    "_ZNK2at7Context23deterministicAlgorithmsEv");
}

namespace flash_attn {

bool deterministic_algorithms_enabled() {
  if (torch_global_context == nullptr || torch_deterministic_algorithms == nullptr) return true;
  return torch_deterministic_algorithms(torch_global_context());
}

}  // namespace flash_attn
