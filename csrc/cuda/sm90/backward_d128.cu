#include "backward_launch.h"

namespace flash_attn::sm90 {
namespace {

struct Shape : BackwardShape {};

}  // namespace

const BackwardVariant kBackwardD128 = backward_variant<Shape>("wgmma d128 64x128");

}  // namespace flash_attn::sm90
