#include "../launch.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

struct Tall : Shape {
  static constexpr int kHeadDim = 96, kHeadDimV = 96;
  static constexpr int kConsumers = 3, kBlockN = 80, kStagesKV = 3;
  static constexpr bool kLazyMax = true;
};

// For short sequences and few tiles.
struct Square : Shape {
  static constexpr int kHeadDim = 96, kHeadDimV = 96;
  static constexpr int kConsumers = 2, kBlockN = 128, kStagesKV = 2;
};

constexpr Variant kVariants[] = {
    make_variant<Tall, false>("wgmma d96 192x80", 0.83, 6000),
    make_variant<Square, false>("wgmma d96 128x128", 0.775, 5000),
    make_variant<Tall, true>("wgmma d96 192x80 masked", 0.83, 6000),
    make_variant<Square, true>("wgmma d96 128x128 masked", 0.76, 5400),
};

constexpr Variant kBand[] = {make_band_variant<Tall>("wgmma d96 192x80 band", 0.83, 6000)};

}  // namespace

const Variants kBandD96 = list_of(kBand);
const Variants kD96 = list_of(kVariants);

}  // namespace flash_attn::cuda::sm90::forward
