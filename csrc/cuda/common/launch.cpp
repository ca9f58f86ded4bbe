#include "launch.h"

#include <atomic>
#include <random>

namespace flash_attn::cuda {

uint64_t new_launch_id() {
  static std::atomic<uint64_t> next{uint64_t{std::random_device{}()} << 32 | 1};
  return next.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace flash_attn::cuda
