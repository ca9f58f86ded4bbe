#include "../extended/launch.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

struct Square : Shape {
  static constexpr int kHeadDim = 128, kHeadDimV = 128;
  static constexpr int kConsumers = 2, kBlockN = 128, kStagesKV = 2;
};

constexpr Variant kVariants[] = {
    make_extended_variant<Square, Bias::kNone, false>("wgmma d128 128x128 extended", 0.8, 5000),
    make_extended_variant<Square, Bias::kNone, true>("wgmma d128 128x128 extended rules", 0.5, 6000),
    make_extended_variant<Square, Bias::kStaged, false>("wgmma d128 128x128 biased", 0.6, 5000),
    make_extended_variant<Square, Bias::kStaged, true>("wgmma d128 128x128 biased rules", 0.5, 6000),
    make_extended_variant<Square, Bias::kLoaded, true>("wgmma d128 128x128 biased rules by loads", 0.4, 6000),
};

}  // namespace

const Variants kExtendedD128 = list_of(kVariants);

}  // namespace flash_attn::cuda::sm90::forward
