#include "../launch.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

struct Square : Shape {
  static constexpr int kHeadDim = 256, kHeadDimV = 256;
  static constexpr int kConsumers = 2, kBlockN = 64, kStagesQ = 1, kStagesKV = 2;
  static constexpr bool kOutBuffer = true;
};

constexpr Variant kVariants[] = {
    make_variant<Square, false>("wgmma d256 128x64", 0.965, 8900),
    make_cluster_variant<Square, false>("wgmma d256 cluster 128x64", 0.965, 8900),
    make_variant<Square, true>("wgmma d256 128x64 masked", 0.975, 8900),
    make_cluster_variant<Square, true>("wgmma d256 cluster 128x64 masked", 0.975, 8900),
};

constexpr Variant kBand[] = {make_band_variant<Square>("wgmma d256 128x64 band", 0.975, 8900)};

}  // namespace

const Variants kBandD256 = list_of(kBand);
const Variants kD256 = list_of(kVariants);

}  // namespace flash_attn::cuda::sm90::forward
