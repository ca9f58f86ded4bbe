#pragma once

#include "../../../kernel.h"

namespace flash_attn::cuda::sm80 {

void launch_forward(const ForwardParams& params, const DeviceInfo& device, void* stream);

}  // namespace flash_attn::cuda::sm80
