// Which instruction set the CPU family runs on: the best the processor has, or what FLASH_ATTN_CPU names.
#include "isa.h"

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flash_attn::cpu {
namespace {

constexpr int kDTypes = 4;  // fp64, fp32, bf16, fp16: the first of DType

struct Isa {
  const char* name;
  bool (*supported)();
  void (*forward)(const ForwardParams&);
  void (*backward)(const BackwardParams&);
  void (*forward_bf16)(const ForwardParams&);
  void (*backward_bf16)(const BackwardParams&);
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every such processor has f16c
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

/// Also asks the system for the tile registers, which a process does not have from the start.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kLeaf = 7, kBFloat16 = 1u << 22, kTiles = 1u << 24;  // of CPUID, in edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;             // of arch_prctl
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  static const bool has = has_avx512_bf16() && __get_cpuid_count(kLeaf, 0, &eax, &ebx, &ecx, &edx) != 0 &&
                          (edx & kBFloat16) != 0 && (edx & kTiles) != 0 &&
                          syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return has;
#else
  return false;
#endif
}
#endif

// Best last.
constexpr Isa kIsas[] = {
    {"generic", always, generic::run_forward, generic::run_backward, generic::run_forward, generic::run_backward},
#if defined(__x86_64__)
    {"avx2", has_avx2, avx2::run_forward, avx2::run_backward, avx2::run_forward, avx2::run_backward},
    {"avx512", has_avx512, avx512::run_forward, avx512::run_backward, avx512::run_forward, avx512::run_backward},
    {"avx512_bf16", has_avx512_bf16, avx512::run_forward, avx512::run_backward, avx512_bf16::run_forward,
     avx512_bf16::run_backward},
    {"amx", has_amx, avx512::run_forward, avx512::run_backward, amx::run_forward, amx::run_backward},
#endif
};

const Isa& best_isa() {
  const Isa* best = &kIsas[0];
  for (const Isa& isa : kIsas) {
    if (isa.supported()) best = &isa;
  }
  return *best;
}

/// Throws for a FLASH_ATTN_CPU that names nothing this processor can run.
const Isa& select_isa() {
  const char* wanted = std::getenv("FLASH_ATTN_CPU");
  if (wanted == nullptr || *wanted == '\0') {
    static const Isa& best = best_isa();
    return best;
  }
  std::string supported;
  for (const Isa& isa : kIsas) {
    if (!isa.supported()) continue;
    if (std::string(wanted) == isa.name) return isa;
    supported += std::string(supported.empty() ? "" : ", ") + isa.name;
  }
  throw std::runtime_error("FLASH_ATTN_CPU must name an instruction set of this processor (" + supported +
                           "), but is \"" + wanted + "\"");
}

/// "cpu avx512 fp32"; lives as long as the program.
const char* kernel_name(const Isa& isa, DType dtype) {
  static const auto names = [] {
    std::vector<std::array<std::string, kDTypes>> all;
    for (const Isa& each : kIsas) {
      const std::string family = std::string("cpu ") + each.name;
      all.push_back({family + " fp64", family + " fp32", family + " bf16", family + " fp16"});
    }
    return all;
  }();
  return names[size_t(&isa - kIsas)][size_t(dtype)].c_str();
}

Plan plan_forward(const ForwardParams& p, const DeviceInfo&) {
  return {kernel_name(select_isa(), p.dtype), int(kForwardBlockM), int(kForwardBlockN), 0};
}

Plan plan_backward(const BackwardParams& params, const DeviceInfo&) {
  return {kernel_name(select_isa(), params.forward.dtype), int(kBackwardBlockM), int(kBackwardBlockN), 0};
}

void launch_forward(const ForwardParams& p, const DeviceInfo&, void*) {
  const Isa& isa = select_isa();
  (p.dtype == DType::kBFloat16 ? isa.forward_bf16 : isa.forward)(p);
}

void launch_backward(const BackwardParams& params, const DeviceInfo&, void*) {
  const Isa& isa = select_isa();
  (params.forward.dtype == DType::kBFloat16 ? isa.backward_bf16 : isa.backward)(params);
}

template <typename Params>
const char* refuses_nothing(const Params&, const DeviceInfo&) {
  return nullptr;
}

}  // namespace

const ForwardKernel kForward = {"cpu", refuses_nothing<ForwardParams>, plan_forward, launch_forward};
const BackwardKernel kBackward = {"cpu", refuses_nothing<BackwardParams>, plan_backward, launch_backward};

}  // namespace flash_attn::cpu
