#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<64, 4, 2, 128, 128, 2, 3, false>("mma d64 128x128"),
    forward_variant<64, 4, 1, 64, 64, 2, 3, true>("mma d64 64x64 extended"),
};

}  // namespace

extern const ForwardVariants kForwardD64 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
