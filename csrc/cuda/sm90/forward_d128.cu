#include "forward_launch.h"

namespace flash_attn::sm90 {
namespace {

struct Square : ForwardShape {
  static constexpr int kConsumers = 2, kBlockN = 128, kStagesKV = 2;
};

struct Tall : ForwardShape {
  static constexpr int kConsumers = 3, kBlockN = 64, kStagesKV = 4;
  static constexpr bool kLazyMax = true;
};

struct TallWide : ForwardShape {
  static constexpr int kConsumers = 3, kBlockN = 80, kStagesKV = 3;
  static constexpr bool kLazyMax = true;
};

constexpr ForwardVariant kVariants[] = {
    forward_variant<Square, false>("wgmma d128 128x128", 0.88, 4500),
    forward_variant<Tall, false>("wgmma d128 192x64", 0.94, 6100),
    forward_variant<TallWide, false>("wgmma d128 192x80", 0.96, 6200),
    forward_variant<Square, true>("wgmma d128 128x128 masked", 0.92, 6300),
    forward_variant<Tall, true>("wgmma d128 192x64 masked", 0.975, 6300),
    forward_variant<TallWide, true>("wgmma d128 192x80 masked", 0.995, 6600),
};

}  // namespace

const ForwardVariants kForwardD128 = list_of(kVariants);

}  // namespace flash_attn::sm90
