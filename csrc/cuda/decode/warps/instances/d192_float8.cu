#include "../instance.h"

namespace flash_attn::cuda::decode {
namespace {

const Variant kVariants[] = {
    variant<192, 16, 1, true>("decode float8 d192 16x128"),
    variant<192, 32, 1, true>("decode float8 d192 32x128"),
};

}  // namespace

extern const Variants kD192Float8 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::decode
