// Kernels under torch's own ops for attention, in the place of torch's: whatever calls `scaled_dot_product_attention`
// of torch, from C++ too, then runs ours where torch would have run one of its fused kernels.
#pragma once

#include "../host_device.h"

/// Puts them there, for "CPU" or "CUDA". flash_attn/sdpa/aten.py asks before whether the ops have the schemas that they
/// are written for.
extern "C" FLASH_ATTN_EXPORT void flash_attn_override(const char* device);
/// Torch's kernels are back.
extern "C" FLASH_ATTN_EXPORT void flash_attn_restore(const char* device);
