// A ring of buffers between a producer and its consumers.
#pragma once

#include "../../common/ptx.h"

namespace flash_attn::cuda::sm90 {

/// Place in the ring. The parity of a barrier's phase flips with every round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  FLASH_ATTN_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace flash_attn::cuda::sm90
