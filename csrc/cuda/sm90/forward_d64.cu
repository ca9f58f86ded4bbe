#include "forward_launch.h"

namespace flash_attn::sm90 {
namespace {

struct Tall : ForwardShape {
  static constexpr int kHeadDim = 64, kHeadDimV = 64;
  static constexpr int kConsumers = 4, kBlockN = 64, kStagesKV = 4;
};

struct Wide : ForwardShape {
  static constexpr int kHeadDim = 64, kHeadDimV = 64;
  static constexpr int kConsumers = 3, kBlockN = 128, kStagesKV = 3;
};

// For few tiles.
struct Square : ForwardShape {
  static constexpr int kHeadDim = 64, kHeadDimV = 64;
  static constexpr int kConsumers = 2, kBlockN = 128, kStagesKV = 4;
};

constexpr ForwardVariant kVariants[] = {
    forward_variant<Tall, false>("wgmma d64 256x64", 0.665, 4700),
    forward_variant<Wide, false>("wgmma d64 192x128", 0.705, 4100),
    forward_variant<Square, false>("wgmma d64 128x128", 0.54, 2800),
    forward_variant<Tall, true>("wgmma d64 256x64 masked", 0.685, 4900),
    forward_variant<Wide, true>("wgmma d64 192x128 masked", 0.725, 4400),
    forward_variant<Square, true>("wgmma d64 128x128 masked", 0.575, 3600),
};

}  // namespace

const ForwardVariants kForwardD64 = list_of(kVariants);

}  // namespace flash_attn::sm90
