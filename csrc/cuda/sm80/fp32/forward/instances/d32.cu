#include "../instance.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<32, 4, 2, 64, 2, 2, false>("mma fp32 d32 128x64"),
};

}  // namespace

extern const ForwardVariants kForwardD32 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80::fp32
