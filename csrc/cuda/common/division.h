// Division by numbers that the host knows.
#pragma once

#include <cstdint>

#include "../../host_device.h"

namespace flash_attn::cuda {

/// Division of n < 2^31 by a number that the host knows, as a multiplication (Granlund and Montgomery, "Division by
/// invariant integers using multiplication", 1994).
struct Divisor {
  uint32_t value = 1, multiplier = 1u << 31;
  int shift = 31;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)) {
    int bits = 0;
    while ((int64_t{1} << bits) < divisor) ++bits;
    shift = 31 + bits;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + value - 1) / value);
  }
  FLASH_ATTN_HOST_DEVICE int divide(int n) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * multiplier >> shift);
  }
  FLASH_ATTN_HOST_DEVICE int divide(int n, int& rest) const {
    const int quotient = divide(n);
    rest = n - quotient * static_cast<int>(value);
    return quotient;
  }
};

}  // namespace flash_attn::cuda
