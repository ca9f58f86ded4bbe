#include "../pair/launch.h"

namespace flash_attn::cuda::sm90::backward {

const Variant kD256 = pair::make_variant<256, 256>("wgmma d256 64x128 pair");
const Variant kD256Band = pair::make_band_variant<256, 256>("wgmma d256 64x128 pair band");

}  // namespace flash_attn::cuda::sm90::backward
