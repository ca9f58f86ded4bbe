#include "../extended/launch.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

struct Wide : Shape {
  static constexpr int kHeadDim = 64, kHeadDimV = 64;
  static constexpr int kConsumers = 3, kBlockN = 128, kStagesKV = 3;
};

struct Square : Shape {
  static constexpr int kHeadDim = 64, kHeadDimV = 64;
  static constexpr int kConsumers = 2, kBlockN = 128, kStagesKV = 3;
};

constexpr Variant kVariants[] = {
    make_extended_variant<Wide, Bias::kNone, false>("wgmma d64 192x128 extended", 0.6, 5000),
    make_extended_variant<Wide, Bias::kNone, true>("wgmma d64 192x128 extended rules", 0.4, 6000),
    make_extended_variant<Square, Bias::kStaged, false>("wgmma d64 128x128 biased", 0.5, 5000),
    make_extended_variant<Square, Bias::kStaged, true>("wgmma d64 128x128 biased rules", 0.4, 6000),
    make_extended_variant<Square, Bias::kLoaded, true>("wgmma d64 128x128 biased rules by loads", 0.3, 6000),
};

}  // namespace

const Variants kExtendedD64 = list_of(kVariants);

}  // namespace flash_attn::cuda::sm90::forward
