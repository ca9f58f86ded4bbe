// The ops flash_attn::forward and flash_attn::backward, as the dispatcher calls them: arguments are taken from `stack`
// in the order of the schema, and results put there.
#pragma once

#include <torch/csrc/stable/library.h>

namespace flash_attn {

void forward(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
void backward(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

}  // namespace flash_attn
