#include "../extended/launch.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

struct Square : Shape {
  static constexpr int kHeadDim = 192, kHeadDimV = 192;
  static constexpr int kConsumers = 2, kBlockN = 64, kStagesQ = 1, kStagesKV = 2;
  static constexpr bool kOutBuffer = true;
};

constexpr Variant kVariants[] = {
    make_extended_variant<Square, Bias::kNone, true>("wgmma d192 128x64 extended rules", 0.6, 8000),
    make_extended_variant<Square, Bias::kStaged, true>("wgmma d192 128x64 biased rules", 0.6, 6000),
    make_extended_variant<Square, Bias::kLoaded, true>("wgmma d192 128x64 biased rules by loads", 0.5, 8000),
};

}  // namespace

const Variants kExtendedD192 = list_of(kVariants);

}  // namespace flash_attn::cuda::sm90::forward
