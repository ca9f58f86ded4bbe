#include "../pair/launch.h"

namespace flash_attn::cuda::sm90::backward {

const Variant kD256 = pair::make_variant<256, 256>("wgmma d256 64x128 pair");

}  // namespace flash_attn::cuda::sm90::backward
