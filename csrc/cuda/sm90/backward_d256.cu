#include "backward_pair_launch.h"

namespace flash_attn::sm90 {

const BackwardVariant kBackwardD256Ordered =
    backward_pair_variant<256, 256, true>("wgmma d256 64x128 pair ordered dq", nullptr);
const BackwardVariant kBackwardD256 =
    backward_pair_variant<256, 256, false>("wgmma d256 64x128 pair", &kBackwardD256Ordered);

}  // namespace flash_attn::sm90
