#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<96, 4, 2, 64, 32, 2, 4, false>("mma d96 128x64 halves"),
    forward_variant<96, 4, 1, 64, 64, 2, 3, true>("mma d96 64x64 extended"),
};

}  // namespace

extern const ForwardVariants kForwardD96 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
