// P of the backward passes.
#pragma once

#include "../ptx.h"

namespace flash_attn::cuda {

/// 2^x of a score less lse, to the base 2, which is above 0 by rounding alone; of scores of 2^31 that is 2^128, and a
/// sum over it NaN. So it is 2^-|x|, at most 1: the sign and the bars are free.
FLASH_ATTN_DEVICE float probability(float x) { return fast_exp2(-fabsf(x)); }

}  // namespace flash_attn::cuda
