// Division by numbers that the host knows.
#pragma once

#include <cstdint>

#include "../../host_device.h"

namespace flash_attn::cuda {

/// Division of 0 <= n < 2^31, as a multiplication (Granlund and Montgomery, "Division by invariant integers using
/// multiplication", 1994, figure 4.1).
struct Divisor {
  uint32_t value = 1, multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift) < value) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - value) << 32) / value) + 1;
  }
  FLASH_ATTN_HOST_DEVICE int divide(int n) const {
#ifdef __CUDA_ARCH__
    return static_cast<int>((__umulhi(n, multiplier) + n) >> shift);
#else
    return static_cast<int>(((uint64_t{static_cast<uint32_t>(n)} * multiplier >> 32) + n) >> shift);
#endif
  }
  FLASH_ATTN_HOST_DEVICE int divide(int n, int& rest) const {
    const int quotient = divide(n);
    rest = n - quotient * static_cast<int>(value);
    return quotient;
  }
};

}  // namespace flash_attn::cuda
