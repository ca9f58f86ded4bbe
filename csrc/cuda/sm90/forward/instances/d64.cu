#include "../launch.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

struct Tall : Shape {
  static constexpr int kHeadDim = 64, kHeadDimV = 64;
  static constexpr int kConsumers = 4, kBlockN = 64, kStagesKV = 4;
};

struct Wide : Shape {
  static constexpr int kHeadDim = 64, kHeadDimV = 64;
  static constexpr int kConsumers = 3, kBlockN = 128, kStagesKV = 3;
};

// For few tiles.
struct Square : Shape {
  static constexpr int kHeadDim = 64, kHeadDimV = 64;
  static constexpr int kConsumers = 2, kBlockN = 128, kStagesKV = 4;
};

constexpr Variant kVariants[] = {
    make_variant<Tall, false>("wgmma d64 256x64", 0.665, 4700),
    make_variant<Wide, false>("wgmma d64 192x128", 0.705, 4100),
    make_variant<Square, false>("wgmma d64 128x128", 0.54, 2800),
    make_cluster_variant<Square, false>("wgmma d64 cluster 128x128", 0.54, 2800),
    make_variant<Tall, true>("wgmma d64 256x64 masked", 0.685, 4900),
    make_variant<Wide, true>("wgmma d64 192x128 masked", 0.725, 4400),
    make_variant<Square, true>("wgmma d64 128x128 masked", 0.575, 3600),
    make_cluster_variant<Square, true>("wgmma d64 cluster 128x128 masked", 0.575, 3600),
};

constexpr Variant kBand[] = {make_band_variant<Wide>("wgmma d64 192x128 band", 0.725, 4400)};

}  // namespace

const Variants kBandD64 = list_of(kBand);
const Variants kD64 = list_of(kVariants);

}  // namespace flash_attn::cuda::sm90::forward
