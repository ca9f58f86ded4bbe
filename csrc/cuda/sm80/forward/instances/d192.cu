#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<192, 4, 1, 64, 64, 2, 3, false>("mma d192 64x64"),
    forward_variant<192, 4, 1, 64, 64, 2, 2, false>("mma d192 64x64 s2"),
    forward_variant<192, 4, 1, 64, 32, 2, 3, true>("mma d192 64x64 halves extended"),
};

}  // namespace

extern const ForwardVariants kForwardD192 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
