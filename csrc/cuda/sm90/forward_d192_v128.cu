#include "forward_launch.h"

namespace flash_attn::sm90 {
namespace {

struct Square : ForwardShape {
  static constexpr int kHeadDim = 192, kHeadDimV = 128;
  static constexpr int kConsumers = 2, kBlockN = 96, kStagesKV = 2;
};

constexpr ForwardVariant kVariants[] = {
    forward_variant<Square, false>("wgmma d192/128 128x96", 0.93, 6300),
    forward_variant<Square, true>("wgmma d192/128 128x96 masked", 0.93, 6300),
};

}  // namespace

const ForwardVariants kForwardD192V128 = list_of(kVariants);

}  // namespace flash_attn::sm90
