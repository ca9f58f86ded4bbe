#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<512, 8, 2, 64, 16, 1, 2, false, 4>("mma d512 64x64"),
    forward_variant<512, 8, 1, 32, 16, 1, 2, false, 2>("mma d512 64x32"),
    forward_variant<512, 4, 1, 32, 16, 1, 2, false, 2>("mma d512 32x32"),
};

}  // namespace

extern const ForwardVariants kForwardD512 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
