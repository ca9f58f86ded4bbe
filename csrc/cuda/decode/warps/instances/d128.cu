#include "../instance.h"

namespace flash_attn::cuda::decode {
namespace {

const Variant kVariants[] = {
    variant<128, 16, 2>("decode d128 16x64"),
    variant<128, 32, 2>("decode d128 32x64"),
    variant<128, 64, 1>("decode d128 64x64"),
};

}  // namespace

extern const Variants kD128 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::decode
