#include "../instance.h"

namespace flash_attn::cuda::decode {

extern const Variant kD64Warpgroup = warpgroup_variant<64, 128, 2>("decode d64 64x128 wgmma");

}  // namespace flash_attn::cuda::decode
