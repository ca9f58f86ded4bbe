#include "../instance.h"

namespace flash_attn::cuda::decode {
namespace {

const Variant kVariants[] = {
    variant<256, 16, 1>("decode d256 16x64"),
    variant<256, 32, 1>("decode d256 32x64"),
    variant<256, 64, 1>("decode d256 64x32"),
};

}  // namespace

extern const Variants kD256 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::decode
