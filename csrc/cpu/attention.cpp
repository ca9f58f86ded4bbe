// The family's entries: nothing is refused; processor and dtype pick the code.
#include <array>
#include <string>
#include <vector>

#include "cpu.h"
#include "isa.h"

namespace flash_attn::cpu {
namespace {

constexpr int kDTypes = 4;  // fp64, fp32, bf16, fp16: the first of DType

Passes passes_of(Isa isa, DType dtype) {
#if defined(__x86_64__)
  const bool is_bfloat16 = dtype == DType::kBFloat16;
  switch (isa) {
    case Isa::generic: break;
    case Isa::avx2: return passes<Isa::avx2>();
    case Isa::avx512: return passes<Isa::avx512>();
    case Isa::avx512_bf16: return is_bfloat16 ? passes<Isa::avx512_bf16>() : passes<Isa::avx512>();
    case Isa::amx: return is_bfloat16 ? passes<Isa::amx>() : passes<Isa::avx512>();
  }
#endif
  return passes<Isa::generic>();
}

/// "cpu avx512 fp32"; lives as long as the program.
const char* kernel_name(Isa isa, DType dtype) {
  static const auto names = [] {
    std::vector<std::array<std::string, kDTypes>> all;
    for (int isa = 0; isa <= int(Isa::amx); ++isa) {
      const std::string family = std::string("cpu ") + name_of(Isa(isa));
      all.push_back({family + " fp64", family + " fp32", family + " bf16", family + " fp16"});
    }
    return all;
  }();
  return names[size_t(isa)][size_t(dtype)].c_str();
}

Plan plan_forward(const ForwardParams& p, const DeviceInfo&) {
  const Isa isa = select_isa();
  // Of AMX only bfloat16 makes use.
  const int64_t rows = forward_block_rows(p.dtype == DType::kBFloat16 ? isa : Isa::generic);
  return {kernel_name(isa, p.dtype), int(rows), int(kForwardBlockN), 0};
}

Plan plan_backward(const BackwardParams& params, const DeviceInfo&) {
  return {kernel_name(select_isa(), params.forward.dtype), int(kBackwardBlockM), int(kBackwardBlockN), 0};
}

void launch_forward(const ForwardParams& p, const DeviceInfo&, void*) { passes_of(select_isa(), p.dtype).forward(p); }

void launch_backward(const BackwardParams& params, const DeviceInfo&, void*) {
  passes_of(select_isa(), params.forward.dtype).backward(params);
}

template <typename Params>
const char* refuses_nothing(const Params&, const DeviceInfo&) {
  return nullptr;
}

}  // namespace

const ForwardKernel kForward = {"cpu", refuses_nothing<ForwardParams>, plan_forward, launch_forward};
const BackwardKernel kBackward = {"cpu", refuses_nothing<BackwardParams>, plan_backward, launch_backward};

}  // namespace flash_attn::cpu
