#include "../pair/launch.h"

namespace flash_attn::cuda::sm90::backward {

const Variant kD192 = pair::make_variant<192, 192>("wgmma d192 64x128 pair");
const Variant kD192Band = pair::make_band_variant<192, 192>("wgmma d192 64x128 pair band");

}  // namespace flash_attn::cuda::sm90::backward
