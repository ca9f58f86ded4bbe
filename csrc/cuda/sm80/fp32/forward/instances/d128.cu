#include "../instance.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<128, 8, 1, 64, 4, 1, false>("mma fp32 d128 128x64"),
    forward_variant<128, 4, 1, 32, 4, 2, false>("mma fp32 d128 64x32"),
    forward_variant<128, 8, 1, 64, 4, 1, true>("mma fp32 d128 128x64 extended"),
};

}  // namespace

extern const ForwardVariants kForwardD128 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80::fp32
