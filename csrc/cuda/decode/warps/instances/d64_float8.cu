#include "../instance.h"

namespace flash_attn::cuda::decode {
namespace {

const Variant kVariants[] = {
    variant<64, 16, 2, true>("decode float8 d64 16x256"),
    variant<64, 32, 2, true>("decode float8 d64 32x256"),
    variant<64, 64, 1, true>("decode float8 d64 64x256"),
};

}  // namespace

extern const Variants kD64Float8 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::decode
