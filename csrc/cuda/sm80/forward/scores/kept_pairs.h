// What dropout keeps of one warp's fragments, on packed P; see common/scores/dropout_bits.h.
#pragma once

#include "../../../common/scores/dropout_bits.h"
#include "../../mma.h"

namespace flash_attn::cuda::sm80 {

template <int kNTiles>
struct KeptPairs : KeptFragments<kNTiles> {
  /// Of word `pair` of P as the A operand of P V: ones in the halves that are kept.
  SM80_DEVICE uint32_t mask(int pair) const {
    // The bits of pairs n and n + 8 become signs of bytes, which prmt spreads over halves of words.
    const uint32_t x = this->bits[pair / 16] << (7 - pair % 8);
    return pair % 16 < 8 ? permute_bytes<0xaa88>(x) : permute_bytes<0xbb99>(x);
  }
};

}  // namespace flash_attn::cuda::sm80
