#include "../pair/launch.h"

namespace flash_attn::cuda::sm90::backward {

const Variant kD192V128 = pair::make_variant<192, 128>("wgmma d192 v128 64x128 pair");

}  // namespace flash_attn::cuda::sm90::backward
