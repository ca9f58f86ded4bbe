#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<64, 4, 2, 96, 48, 2, false>("mma d64 128x96 halves"),
    forward_variant<64, 4, 1, 64, 64, 2, true>("mma d64 64x64 extended"),
};

}  // namespace

extern const ForwardVariants kForwardD64 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
