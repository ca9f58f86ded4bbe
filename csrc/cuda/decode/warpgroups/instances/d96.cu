#include "../instance.h"

namespace flash_attn::cuda::decode {

extern const Variant kD96Warpgroup = warpgroup_variant<96, 64, 2>("decode d96 64x64 wgmma");

}  // namespace flash_attn::cuda::decode
