#include "../instance.h"

namespace flash_attn::cuda::decode {
namespace {

const Variant kVariants[] = {
    variant<64, 16, 2>("decode d64 16x128"),
    variant<64, 32, 2>("decode d64 32x128"),
    variant<64, 64, 1>("decode d64 64x128"),
};

}  // namespace

extern const Variants kD64 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::decode
