#include "../instance.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<16, 4, 2, 64, 1, 2, false>("mma fp32 d16 128x64"),
};

}  // namespace

extern const ForwardVariants kForwardD16 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80::fp32
