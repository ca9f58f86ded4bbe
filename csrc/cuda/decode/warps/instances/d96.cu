#include "../instance.h"

namespace flash_attn::cuda::decode {
namespace {

const Variant kVariants[] = {
    variant<96, 16, 2>("decode d96 16x64"),
    variant<96, 32, 2>("decode d96 32x64"),
    variant<96, 64, 1>("decode d96 64x64"),
};

}  // namespace

extern const Variants kD96 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::decode
