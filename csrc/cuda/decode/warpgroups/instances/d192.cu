#include "../instance.h"

namespace flash_attn::cuda::decode {

extern const Variant kD192Warpgroup = warpgroup_variant<192, 64, 1>("decode d192 64x64 wgmma");

}  // namespace flash_attn::cuda::decode
