#include "../instance.h"

namespace flash_attn::cuda::decode {

extern const Variant kD256Warpgroup = warpgroup_variant<256, 64, 1>("decode d256 64x64 wgmma");

}  // namespace flash_attn::cuda::decode
