#include "../instance.h"

namespace flash_attn::cuda::decode {
namespace {

const Variant kVariants[] = {
    variant<256, 16, 1, true>("decode float8 d256 16x128"),
    variant<256, 32, 1, true>("decode float8 d256 32x128"),
};

}  // namespace

extern const Variants kD256Float8 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::decode
