// Sixteen neighbouring values of a row of attn_mask, a bit each. A score is seen under True, and under everything but
// -inf; it is biased where a number other than 0 is added to it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

namespace flash_attn::cuda::mask {

/// Bits 0 to 15, the first column lowest.
struct RowBits {
  uint32_t seen = 0, biased = 0;
};

__device__ __forceinline__ float to_number(float x) { return x; }
__device__ __forceinline__ double to_number(double x) { return x; }
__device__ __forceinline__ float to_number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_number(__half x) { return __half2float(x); }

__device__ __forceinline__ void add_value(RowBits& bits, int column, uint8_t x) {
  bits.seen |= uint32_t(x != 0) << column;
}

template <typename Storage>
__device__ __forceinline__ void add_value(RowBits& bits, int column, Storage x) {
  const auto number = to_number(x);
  const bool seen = number != -INFINITY;
  bits.seen |= uint32_t(seen) << column;
  bits.biased |= uint32_t(seen && number != 0) << column;  // NaN is
}

/// As they lie in memory.
template <typename Storage>
struct SixteenValues {
  uint4 piece[sizeof(Storage)];

  /// Sixteen bytes a load: `from` is aligned so.
  __device__ __forceinline__ void load(const Storage* from) {
#pragma unroll
    for (int i = 0; i < int(sizeof(Storage)); ++i) piece[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }

  /// The or and the and of booleans, four at once.
  __device__ __forceinline__ uint32_t any() const { return piece[0].x | piece[0].y | piece[0].z | piece[0].w; }
  __device__ __forceinline__ uint32_t all() const { return piece[0].x & piece[0].y & piece[0].z & piece[0].w; }

  __device__ __forceinline__ RowBits bits() const {
    RowBits bits;
    if constexpr (sizeof(Storage) == 1) {
      const uint32_t word[4] = {piece[0].x, piece[0].y, piece[0].z, piece[0].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // The highest bit of each byte that is not 0; then the four of them together, in the four highest bits.
        const uint32_t set = (((word[i] & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word[i]) & 0x80808080u;
        bits.seen |= set * 0x00204081u >> 28 << (4 * i);
      }
    } else {
      constexpr int kPerPiece = 16 / int(sizeof(Storage));
#pragma unroll
      for (int i = 0; i < int(sizeof(Storage)); ++i) {
        Storage value[kPerPiece];
        memcpy(value, &piece[i], 16);
#pragma unroll
        for (int j = 0; j < kPerPiece; ++j) add_value(bits, kPerPiece * i + j, value[j]);
      }
    }
    return bits;
  }
};

}  // namespace flash_attn::cuda::mask
