#include "../instance.h"

namespace flash_attn::cuda::decode {

extern const Variant kD128Warpgroup = warpgroup_variant<128, 64, 2>("decode d128 64x64 wgmma");

}  // namespace flash_attn::cuda::decode
