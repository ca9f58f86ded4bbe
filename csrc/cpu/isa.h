// The instruction sets that the passes are compiled for. passes.cpp is compiled once for each, with its name as
// FLASH_ATTN_ISA; what the headers there define lies in unnamed namespaces, so that the linker keeps the code of every
// instruction set apart. Only passes() is seen from outside.
#pragma once

#include "../params.h"

namespace flash_attn::cpu {

enum class Isa { generic, avx2, avx512, avx512_bf16, amx };  // best last

// Query rows and key rows of a tile. On AMX a tile of the forward pass, with all that is made of it, fits the
// first-level cache: products are so fast there that what lies beyond is waited for.
constexpr int64_t forward_block_rows(Isa isa) { return isa == Isa::amx ? 32 : 96; }
constexpr int64_t kForwardBlockN = 64;
constexpr int64_t kBackwardBlockM = 96, kBackwardBlockN = 128;

struct Passes {
  void (*forward)(const ForwardParams&);
  void (*backward)(const BackwardParams&);
};

template <Isa isa>
Passes passes();
template <>
Passes passes<Isa::generic>();
template <>
Passes passes<Isa::avx2>();
template <>
Passes passes<Isa::avx512>();
template <>
Passes passes<Isa::avx512_bf16>();  // of bfloat16 alone
template <>
Passes passes<Isa::amx>();  // of bfloat16 alone

/// The fastest that the processor has, or what FLASH_ATTN_CPU names. Throws if that is none it can run.
Isa select_isa();
/// What FLASH_ATTN_CPU calls it.
const char* name_of(Isa isa);

}  // namespace flash_attn::cpu
