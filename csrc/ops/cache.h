// The ops on a cache of keys and values, and the rotary ops, as the dispatcher calls them (see attention.h).
#pragma once

#include <torch/csrc/stable/library.h>

namespace flash_attn {

void attend_cache(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
void append_and_attend(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
void rotary(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
void rotary_in_place(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

}  // namespace flash_attn
