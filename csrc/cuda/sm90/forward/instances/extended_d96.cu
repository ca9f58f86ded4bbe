#include "../extended/launch.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

struct Square : Shape {
  static constexpr int kHeadDim = 96, kHeadDimV = 96;
  static constexpr int kConsumers = 2, kBlockN = 128, kStagesKV = 2;
};

constexpr Variant kVariants[] = {
    make_extended_variant<Square, Bias::kNone, true>("wgmma d96 128x128 extended rules", 0.5, 6000),
    make_extended_variant<Square, Bias::kStaged, true>("wgmma d96 128x128 biased rules", 0.5, 6000),
    make_extended_variant<Square, Bias::kLoaded, true>("wgmma d96 128x128 biased rules by loads", 0.4, 6000),
};

}  // namespace

const Variants kExtendedD96 = list_of(kVariants);

}  // namespace flash_attn::cuda::sm90::forward
