#include "backward_launch.h"

namespace flash_attn::sm90 {
namespace {

struct Shape : BackwardShape {
  static constexpr int kHeadDim = 96;
};

}  // namespace

const BackwardVariant kBackwardD96 = backward_variant<Shape>("wgmma d96 64x128");

}  // namespace flash_attn::sm90
