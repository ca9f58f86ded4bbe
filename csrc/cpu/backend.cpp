// The CPU as the ops see it: one family, no facts that planning depends on, no streams.
#include "../backend.h"

#include "cpu.h"

namespace flash_attn {

const Backend& cpu_backend() {
  static const Backend backend = {
      {&cpu::kForward},
      {&cpu::kBackward},
      cpu::copy_rows,
      cpu::pack_mask,
      [](int) { return DeviceInfo{}; },
      [](int, int*) -> void* { return nullptr; },
      [](int, int) {},
  };
  return backend;
}

}  // namespace flash_attn
