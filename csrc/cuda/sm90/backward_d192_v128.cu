#include "backward_pair_launch.h"

namespace flash_attn::sm90 {

const BackwardVariant kBackwardD192V128Ordered =
    backward_pair_variant<192, 128, true>("wgmma d192 v128 64x128 pair ordered dq", nullptr);
const BackwardVariant kBackwardD192V128 =
    backward_pair_variant<192, 128, false>("wgmma d192 v128 64x128 pair", &kBackwardD192V128Ordered);

}  // namespace flash_attn::sm90
