#pragma once

#include "tensor_info.h"
#include "torch/tensor.h"

namespace flash_attn {

/// Seed and offset of one call's dropout, (2) int64 on `like`'s device: what torch.randint would draw there, from its
/// default generator.
Tensor drawn_rng_state(const TensorInfo& like);

}  // namespace flash_attn
