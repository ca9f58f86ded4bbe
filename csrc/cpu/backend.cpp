// The CPU as the ops see it: one family, no facts that planning depends on, no streams.
#include "../backend.h"

#include "cpu.h"

namespace flash_attn {

namespace {

void* unread(int, int64_t bytes) {
  constexpr int64_t kBytes = 8 << 10;  // more is computed for so long that an allocation does not count
  alignas(64) static thread_local char room[kBytes];
  return bytes <= kBytes ? room : nullptr;
}

}  // namespace

const Backend& cpu_backend() {
  static const Backend backend = {
      {&cpu::kForward},
      {&cpu::kBackward},
      {},
      cpu::copy_rows,
      nullptr,
      cpu::pack_mask,
      nullptr,
      [](int) { return DeviceInfo{}; },
      [](int, int*) -> void* { return nullptr; },
      [](int, int) {},
      unread,
  };
  return backend;
}

}  // namespace flash_attn
