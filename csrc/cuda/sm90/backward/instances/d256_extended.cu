#include "../extended_pair/launch.h"

namespace flash_attn::cuda::sm90::backward {

const Variant kD256Extended = extended_pair::make_variant<256, 256>("wgmma d256 64x128 pair extended");
const Variant kD256Dmask = extended_pair::make_variant<256, 256, true>("wgmma d256 64x128 pair extended dmask");

}  // namespace flash_attn::cuda::sm90::backward
