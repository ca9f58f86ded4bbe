#include "../instance.h"

namespace flash_attn::cuda::decode {
namespace {

const Variant kVariants[] = {
    variant<128, 16, 2, true>("decode float8 d128 16x128"),
    variant<128, 32, 2, true>("decode float8 d128 32x128"),
    variant<128, 64, 1, true>("decode float8 d128 64x128"),
};

}  // namespace

extern const Variants kD128Float8 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::decode
