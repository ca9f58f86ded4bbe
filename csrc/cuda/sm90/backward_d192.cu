#include "backward_pair_launch.h"

namespace flash_attn::sm90 {

const BackwardVariant kBackwardD192 = backward_pair_variant<192, 192>("wgmma d192 64x128 pair");

}  // namespace flash_attn::sm90
