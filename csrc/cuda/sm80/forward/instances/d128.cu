#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<128, 4, 2, 64, 64, 2, 3, false>("mma d128 128x64"),
    forward_variant<128, 4, 1, 64, 64, 2, 3, true>("mma d128 64x64 extended"),
};

}  // namespace

extern const ForwardVariants kForwardD128 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
