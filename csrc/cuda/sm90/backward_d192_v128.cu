#include "backward_pair_launch.h"

namespace flash_attn::sm90 {

const BackwardVariant kBackwardD192V128 = backward_pair_variant<192, 128>("wgmma d192 v128 64x128 pair");

}  // namespace flash_attn::sm90
