#include "../launch.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

struct Square : Shape {
  static constexpr int kHeadDim = 256, kHeadDimV = 128;
  static constexpr int kConsumers = 2, kBlockN = 80, kStagesQ = 1, kStagesKV = 2;
  static constexpr bool kOutBuffer = true;
};

constexpr Variant kVariants[] = {
    make_variant<Square, false>("wgmma d256/128 128x80", 0.93, 7000),
    make_variant<Square, true>("wgmma d256/128 128x80 masked", 0.94, 7000),
};

}  // namespace

const Variants kD256V128 = list_of(kVariants);

}  // namespace flash_attn::cuda::sm90::forward
