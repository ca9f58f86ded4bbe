// Kernels under torch's op for attention of extensions, whose derivative is C++: in eager calls of q, k, v and perhaps
// a mask no Python stands between forward and backward.
#pragma once

#include "../host_device.h"

/// Puts them there, for "CPU" or "CUDA", once. flash_attn/torch_op/extension.py asks before whether the op has the
/// schema that they are written for, and no kernel of others.
extern "C" FLASH_ATTN_EXPORT void flash_attn_extend(const char* device);
