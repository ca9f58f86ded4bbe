#include "../launch.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

struct Square : Shape {
  static constexpr int kConsumers = 2, kBlockN = 128, kStagesKV = 2;
};

struct Tall : Shape {
  static constexpr int kConsumers = 3, kBlockN = 64, kStagesKV = 4;
  static constexpr bool kLazyMax = true;
};

struct TallWide : Shape {
  static constexpr int kConsumers = 3, kBlockN = 80, kStagesKV = 3;
  static constexpr bool kLazyMax = true;
};

constexpr Variant kVariants[] = {
    make_variant<Square, false>("wgmma d128 128x128", 0.88, 4500),
    make_cluster_variant<Square, false>("wgmma d128 cluster 128x128", 0.88, 4500),
    make_variant<Tall, false>("wgmma d128 192x64", 0.94, 6100),
    make_variant<TallWide, false>("wgmma d128 192x80", 0.96, 6200),
    make_variant<Square, true>("wgmma d128 128x128 masked", 0.92, 6300),
    make_cluster_variant<Square, true>("wgmma d128 cluster 128x128 masked", 0.92, 6300),
    make_variant<Tall, true>("wgmma d128 192x64 masked", 0.975, 6300),
    make_variant<TallWide, true>("wgmma d128 192x80 masked", 0.995, 6600),
};

constexpr Variant kBand[] = {make_band_variant<TallWide>("wgmma d128 192x80 band", 0.995, 6600)};

}  // namespace

const Variants kBandD128 = list_of(kBand);
const Variants kD128 = list_of(kVariants);

}  // namespace flash_attn::cuda::sm90::forward
