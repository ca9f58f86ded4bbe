#include "../launch.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

struct Square : Shape {
  static constexpr int kHeadDim = 192, kHeadDimV = 192;
  static constexpr int kConsumers = 2, kBlockN = 96, kStagesQ = 1, kStagesKV = 2;
  static constexpr bool kOutBuffer = true;
};

constexpr Variant kVariants[] = {
    make_variant<Square, false>("wgmma d192 128x96", 0.95, 7000),
    make_variant<Square, true>("wgmma d192 128x96 masked", 0.95, 7000),
};

constexpr Variant kBand[] = {make_band_variant<Square>("wgmma d192 128x96 band", 0.95, 7000)};

}  // namespace

const Variants kBandD192 = list_of(kBand);
const Variants kD192 = list_of(kVariants);

}  // namespace flash_attn::cuda::sm90::forward
