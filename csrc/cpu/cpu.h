// The CPU family.
#pragma once

#include <cstdint>
#include <functional>

#include "../kernel.h"

namespace flash_attn::cpu {

extern const ForwardKernel kForward;
extern const BackwardKernel kBackward;

/// Runs body(begin, end) over parts of [0, count) on torch's threads. `body` must not throw.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body);
int num_threads();

}  // namespace flash_attn::cpu
