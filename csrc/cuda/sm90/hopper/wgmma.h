// Warpgroup matrix multiply (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"): D(64 x N) += A(64 x 16)
// B(16 x N), 16-bit operands, float accumulators. B lies in shared memory; A there too (ss) or in registers (rs).
//
// Warp w of the warpgroup holds rows 16 w .. 16 w + 15, as common/scores/fragment.h says.
#pragma once

#include "../../common/scores/fragment.h"

namespace flash_attn::cuda::sm90 {

// ---- operands in shared memory
//
// A tile is a sequence of panels, 64 columns (128 bytes) wide, each [rows][64] in the 128-byte swizzle as TMA writes
// it: the 16-byte chunk c of row r stands at chunk c ^ (r % 8). A panel starts on a multiple of 1024 bytes. The upper
// word of a matrix descriptor is the same for all of these tiles (128-byte swizzle, 1024 bytes between groups of eight
// rows), so a descriptor is passed as its lower word: address / 16, and the stride between panels / 16 above it, which
// only an operand whose k runs along the rows uses.

constexpr uint32_t kDescriptorHigh = 0x40000040;

FLASH_ATTN_DEVICE uint32_t descriptor(const void* tile) { return shared_address(tile) >> 4; }

/// For an operand that is read across its rows: a B whose k runs along the rows of the tile.
FLASH_ATTN_DEVICE uint32_t descriptor_across(const void* tile, int rows) {
  return shared_address(tile) >> 4 | static_cast<uint32_t>(rows * 8) << 16;
}

// The same in a cluster, where a shared address has the CTA's rank above bit 18; of tiles of 64 rows.
FLASH_ATTN_DEVICE uint32_t cluster_descriptor(const void* tile) { return (shared_address(tile) & 0x3FFFF) >> 4; }
FLASH_ATTN_DEVICE uint32_t cluster_descriptor_across(const void* tile) {
  return cluster_descriptor(tile) | (64 * 8) << 16;
}

/// What to add to the descriptor of a tile with `rows` rows to reach k-step `step`, k along the columns.
FLASH_ATTN_DEVICE constexpr uint32_t k_step_along(int step, int rows) { return step / 4 * (rows * 8) + step % 4 * 2; }
/// The same with k along the rows.
FLASH_ATTN_DEVICE constexpr uint32_t k_step_across(int step) { return step * 128; }

/// Along which dimension of its tile an operand's k runs.
enum Major : int { kColumns = 0, kRows = 1 };

// ---- ordering

/// Before the first wgmma that reads registers or accumulators written since the last one.
FLASH_ATTN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FLASH_ATTN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Until at most kPending groups are in flight.
template <int kPending>
FLASH_ATTN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// After a wait: keeps the compiler from reading an accumulator before it.
template <int kSize>
FLASH_ATTN_DEVICE void wgmma_results(float (&acc)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

/// Declares that the next product overwrites `acc`, so that no register is set before it.
template <int kSize>
FLASH_ATTN_DEVICE void wgmma_discard(float (&acc)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "=f"(acc[i]));
}

// ---- instructions, overloaded by the number of accumulators, N / 2

// Ten operands of an asm statement, and the ten accumulators bound to them: SM90_REGISTERS(3) is "%30, ..., %39".
#define SM90_REGISTERS(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define SM90_ACCUMULATORS(t)                                                                            \
  "+f"(acc[t##0]), "+f"(acc[t##1]), "+f"(acc[t##2]), "+f"(acc[t##3]), "+f"(acc[t##4]), "+f"(acc[t##5]), \
      "+f"(acc[t##6]), "+f"(acc[t##7]), "+f"(acc[t##8]), "+f"(acc[t##9])

#define SM90_REGISTERS_30 SM90_REGISTERS() ", " SM90_REGISTERS(1) ", " SM90_REGISTERS(2)
#define SM90_REGISTERS_60 SM90_REGISTERS_30 ", " SM90_REGISTERS(3) ", " SM90_REGISTERS(4) ", " SM90_REGISTERS(5)
#define SM90_REGISTERS_90 SM90_REGISTERS_60 ", " SM90_REGISTERS(6) ", " SM90_REGISTERS(7) ", " SM90_REGISTERS(8)
#define SM90_REGISTERS_32 SM90_REGISTERS_30 ", %30, %31"
#define SM90_REGISTERS_40 SM90_REGISTERS_30 ", " SM90_REGISTERS(3)
#define SM90_REGISTERS_48 SM90_REGISTERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SM90_REGISTERS_64 SM90_REGISTERS_60 ", %60, %61, %62, %63"
#define SM90_REGISTERS_96 SM90_REGISTERS_90 ", %90, %91, %92, %93, %94, %95"
#define SM90_REGISTERS_128 \
  SM90_REGISTERS_90 ", " SM90_REGISTERS(9) ", " SM90_REGISTERS(10) ", " SM90_REGISTERS(11) ", %120, %121, " \
                    "%122, %123, %124, %125, %126, %127"

#define SM90_ACCUMULATORS_30 SM90_ACCUMULATORS(), SM90_ACCUMULATORS(1), SM90_ACCUMULATORS(2)
#define SM90_ACCUMULATORS_60 SM90_ACCUMULATORS_30, SM90_ACCUMULATORS(3), SM90_ACCUMULATORS(4), SM90_ACCUMULATORS(5)
#define SM90_ACCUMULATORS_90 SM90_ACCUMULATORS_60, SM90_ACCUMULATORS(6), SM90_ACCUMULATORS(7), SM90_ACCUMULATORS(8)
#define SM90_ACCUMULATORS_32 SM90_ACCUMULATORS_30, "+f"(acc[30]), "+f"(acc[31])
#define SM90_ACCUMULATORS_40 SM90_ACCUMULATORS_30, SM90_ACCUMULATORS(3)
#define SM90_ACCUMULATORS_48                                                                                      \
  SM90_ACCUMULATORS_40, "+f"(acc[40]), "+f"(acc[41]), "+f"(acc[42]), "+f"(acc[43]), "+f"(acc[44]), "+f"(acc[45]), \
      "+f"(acc[46]), "+f"(acc[47])
#define SM90_ACCUMULATORS_64 SM90_ACCUMULATORS_60, "+f"(acc[60]), "+f"(acc[61]), "+f"(acc[62]), "+f"(acc[63])
#define SM90_ACCUMULATORS_96 \
  SM90_ACCUMULATORS_90, "+f"(acc[90]), "+f"(acc[91]), "+f"(acc[92]), "+f"(acc[93]), "+f"(acc[94]), "+f"(acc[95])
#define SM90_ACCUMULATORS_128                                                                               \
  SM90_ACCUMULATORS_90, SM90_ACCUMULATORS(9), SM90_ACCUMULATORS(10), SM90_ACCUMULATORS(11), "+f"(acc[120]), \
      "+f"(acc[121]), "+f"(acc[122]), "+f"(acc[123]), "+f"(acc[124]), "+f"(acc[125]), "+f"(acc[126]), "+f"(acc[127])

// One shape: n columns, r = n / 2 accumulators, i0 .. i7 the numbers of the operands after them (r, r + 1, ...).
// kAccumulate false: D = A B.
#define SM90_WGMMA(type, n, r, i0, i1, i2, i3, i4, i5, i6, i7)                                                         \
  template <bool kAccumulate, Major kMajorA = kColumns, Major kMajorB = kColumns>                                      \
  static FLASH_ATTN_DEVICE void ss(float (&acc)[r], uint32_t a, uint32_t b) {                                          \
    asm volatile("{.reg .pred p; .reg .b64 da, db; setp.ne.b32 p, %" #i3 ", 0; mov.b64 da, {%" #i0 ", %" #i2           \
                 "}; mov.b64 db, {%" #i1 ", %" #i2 "};\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type \
                 " {" SM90_REGISTERS_##r "}, da, db, p, 1, 1, %" #i4 ", %" #i5 ";}"                                    \
                 : SM90_ACCUMULATORS_##r                                                                               \
                 : "r"(a), "r"(b), "n"(kDescriptorHigh), "n"(int{kAccumulate}), "n"(int{kMajorA}), "n"(int{kMajorB})); \
  }                                                                                                                    \
  template <bool kAccumulate, Major kMajorB = kRows>                                                                   \
  static FLASH_ATTN_DEVICE void rs(float (&acc)[r], const uint32_t* a, uint32_t b) {                                   \
    asm volatile("{.reg .pred p; .reg .b64 db; setp.ne.b32 p, %" #i6 ", 0; mov.b64 db, {%" #i4 ", %" #i5               \
                 "};\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" SM90_REGISTERS_##r           \
                 "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, db, p, 1, 1, %" #i7 ";}"                                \
                 : SM90_ACCUMULATORS_##r                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHigh), "n"(int{kAccumulate}),    \
                   "n"(int{kMajorB}));                                                                                 \
  }

#define SM90_WGMMA_SHAPES(type)                                 \
  SM90_WGMMA(type, 64, 32, 32, 33, 34, 35, 36, 37, 38, 39)      \
  SM90_WGMMA(type, 80, 40, 40, 41, 42, 43, 44, 45, 46, 47)      \
  SM90_WGMMA(type, 96, 48, 48, 49, 50, 51, 52, 53, 54, 55)      \
  SM90_WGMMA(type, 128, 64, 64, 65, 66, 67, 68, 69, 70, 71)     \
  SM90_WGMMA(type, 192, 96, 96, 97, 98, 99, 100, 101, 102, 103) \
  SM90_WGMMA(type, 256, 128, 128, 129, 130, 131, 132, 133, 134, 135)

template <typename Element>
struct Wgmma;
template <>
struct Wgmma<__nv_bfloat16> {
  SM90_WGMMA_SHAPES("bf16")
};
template <>
struct Wgmma<__half> {
  SM90_WGMMA_SHAPES("f16")
};

}  // namespace flash_attn::cuda::sm90
