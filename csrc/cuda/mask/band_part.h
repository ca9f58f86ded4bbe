// What lies behind a packed mask while its band is looked for.
#pragma once

#include <climits>

#include "../../mask_kind.h"

namespace flash_attn::cuda::mask {

using namespace flash_attn::mask;

/// Scores that are seen. They all lie between the first and the last diagonal (column less row) of them, so the mask is
/// a band if and only if they are as many as there are scores between these.
struct SeenScores {
  int first = INT_MAX, last = INT_MIN;
  unsigned long long count = 0;

  __device__ void add(int first_diagonal, int last_diagonal, unsigned more) {
    first = min(first, first_diagonal);
    last = max(last, last_diagonal);
    count += more;
  }
};

struct BandPart : MaskKind {
  int denied;  // 1: whoever packed the mask has seen that it is no band; 0 says nothing
  int blocks;  // that have added theirs
  SeenScores seen;

  /// By whoever packs the mask. Whether it is biased others may have said by then.
  __device__ void start() {
    is_band = 0;
    denied = blocks = 0;
    seen = {};
  }
};
static_assert(sizeof(BandPart) <= kKindBytes);

}  // namespace flash_attn::cuda::mask
