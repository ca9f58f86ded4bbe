#include "backward_pair_launch.h"

namespace flash_attn::sm90 {

const BackwardVariant kBackwardD192Ordered =
    backward_pair_variant<192, 192, true>("wgmma d192 64x128 pair ordered dq", nullptr);
const BackwardVariant kBackwardD192 =
    backward_pair_variant<192, 192, false>("wgmma d192 64x128 pair", &kBackwardD192Ordered);

}  // namespace flash_attn::sm90
