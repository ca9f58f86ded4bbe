// The ops of the library flash_attn, as the dispatcher calls them: arguments are taken from `stack` in the order of the
// schema, and results put there.
#pragma once

#include <torch/csrc/stable/library.h>

namespace flash_attn {

void forward(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
void backward(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
/// The same of q, k and v alone, whose three gradients are all wanted.
void plain_forward(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
void plain_backward(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

/// Reads a mask once, see packed_mask.h.
void pack_mask(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

}  // namespace flash_attn
