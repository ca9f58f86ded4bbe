#include "backward_pair_launch.h"

namespace flash_attn::sm90 {

const BackwardVariant kBackwardD256 = backward_pair_variant<256, 256>("wgmma d256 64x128 pair");

}  // namespace flash_attn::sm90
