#include "../single/launch.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

struct D96 : single::Shape {
  static constexpr int kHeadDim = 96;
};

}  // namespace

const Variant kD96 = single::make_variant<D96>("wgmma d96 64x128");
const Variant kD96Band = single::make_band_variant<D96>("wgmma d96 64x128 band");

}  // namespace flash_attn::cuda::sm90::backward
