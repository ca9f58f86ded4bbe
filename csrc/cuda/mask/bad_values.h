// NaN and infinities among 16-bit elements: what attn_mask hides has probability 0, and 0 times those is NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../../host_device.h"

namespace flash_attn::cuda {

/// The exponent of NaN and infinities, in both halves of a word.
constexpr uint32_t kBadExponentBf16 = 0x7f807f80u, kBadExponentFp16 = 0x7c007c00u;
template <typename Element>
constexpr uint32_t kBadExponent = std::is_same_v<Element, __half> ? kBadExponentFp16 : kBadExponentBf16;

FLASH_ATTN_HOST_DEVICE bool is_bad_low(uint32_t pair, uint32_t exponent) {
  return ((pair ^ exponent) & exponent & 0xffffu) == 0;
}
FLASH_ATTN_HOST_DEVICE bool is_bad_high(uint32_t pair, uint32_t exponent) {
  return ((pair ^ exponent) & exponent) >> 16 == 0;
}
FLASH_ATTN_HOST_DEVICE bool is_bad(uint32_t pair, uint32_t exponent) {
  return is_bad_low(pair, exponent) || is_bad_high(pair, exponent);
}

}  // namespace flash_attn::cuda
