// float32 in the Hopper family: see fp32.cpp.
#pragma once

#include "../../../kernel.h"

namespace flash_attn::cuda::sm90::fp32 {

const char* refuses(const ForwardParams& params, const DeviceInfo& device);
const char* refuses(const BackwardParams& params, const DeviceInfo& device);
flash_attn::Plan plan(const ForwardParams& params, const DeviceInfo& device);
flash_attn::Plan plan(const BackwardParams& params, const DeviceInfo& device);
void launch(const ForwardParams& params, const DeviceInfo& device, void* stream);
void launch(const BackwardParams& params, const DeviceInfo& device, void* stream);

}  // namespace flash_attn::cuda::sm90::fp32
