#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flash_attn::cpu {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every such processor has f16c
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
/// Intel's processors multiply pairs of bfloat16 so slowly that widened to floats they are faster.
bool has_fast_avx512_bf16() { return has_avx512_bf16() && !__builtin_cpu_is("intel"); }

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
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_fast_avx512_bf16() { return false; }
bool has_amx() { return false; }
#endif

struct KnownIsa {
  const char* name;
  bool (*supported)();
};

constexpr KnownIsa kIsas[] = {
    {"generic", [] { return true; }}, {"avx2", has_avx2}, {"avx512", has_avx512},
    {"avx512_bf16", has_avx512_bf16}, {"amx", has_amx},
};
constexpr int kCount = int(sizeof(kIsas) / sizeof(kIsas[0]));

Isa best_isa() {
  int best = 0;
  for (int i = 0; i < kCount; ++i) {
    if (Isa(i) == Isa::avx512_bf16 ? has_fast_avx512_bf16() : kIsas[i].supported()) best = i;
  }
  return Isa(best);
}

}  // namespace

Isa select_isa() {
  const char* wanted = std::getenv("FLASH_ATTN_CPU");
  if (wanted == nullptr || *wanted == '\0') {
    static const Isa best = best_isa();
    return best;
  }
  std::string supported;
  for (int i = 0; i < kCount; ++i) {
    if (!kIsas[i].supported()) continue;
    if (std::string(wanted) == kIsas[i].name) return Isa(i);
    supported += std::string(supported.empty() ? "" : ", ") + kIsas[i].name;
  }
  throw std::runtime_error("FLASH_ATTN_CPU must name an instruction set of this processor (" + supported +
                           "), but is \"" + wanted + "\"");
}

const char* name_of(Isa isa) { return kIsas[int(isa)].name; }

}  // namespace flash_attn::cpu
