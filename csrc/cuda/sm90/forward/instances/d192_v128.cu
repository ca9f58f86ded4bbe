#include "../launch.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

struct Square : Shape {
  static constexpr int kHeadDim = 192, kHeadDimV = 128;
  static constexpr int kConsumers = 2, kBlockN = 96, kStagesKV = 2;
};

constexpr Variant kVariants[] = {
    make_variant<Square, false>("wgmma d192/128 128x96", 0.93, 6300),
    make_variant<Square, true>("wgmma d192/128 128x96 masked", 0.93, 6300),
};

}  // namespace

const Variants kD192V128 = list_of(kVariants);

}  // namespace flash_attn::cuda::sm90::forward
