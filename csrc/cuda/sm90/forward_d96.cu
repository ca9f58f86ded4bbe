#include "forward_launch.h"

namespace flash_attn::sm90 {
namespace {

struct Tall : ForwardShape {
  static constexpr int kHeadDim = 96, kHeadDimV = 96;
  static constexpr int kConsumers = 3, kBlockN = 80, kStagesKV = 3;
  static constexpr bool kLazyMax = true;
};

constexpr ForwardVariant kVariants[] = {
    forward_variant<Tall, false>("wgmma d96 192x80", 0.83, 6000),
    forward_variant<Tall, true>("wgmma d96 192x80 masked", 0.83, 6000),
};

}  // namespace

const ForwardVariants kForwardD96 = list_of(kVariants);

}  // namespace flash_attn::sm90
