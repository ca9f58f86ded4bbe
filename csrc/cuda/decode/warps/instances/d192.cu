#include "../instance.h"

namespace flash_attn::cuda::decode {
namespace {

const Variant kVariants[] = {
    variant<192, 16, 1>("decode d192 16x64"),
    variant<192, 32, 1>("decode d192 32x64"),
    variant<192, 64, 1>("decode d192 64x32"),
};

}  // namespace

extern const Variants kD192 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::decode
