#include "../extended_pair/launch.h"

namespace flash_attn::cuda::sm90::backward {

const Variant kD192Extended = extended_pair::make_variant<192, 192>("wgmma d192 64x128 pair extended");
const Variant kD192Dmask = extended_pair::make_variant<192, 192, true>("wgmma d192 64x128 pair extended dmask");

}  // namespace flash_attn::cuda::sm90::backward
