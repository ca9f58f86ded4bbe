#include "../instance.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<64, 4, 1, 64, 2, 3, false>("mma fp32 d64 64x64"),
    forward_variant<64, 4, 1, 64, 2, 2, true>("mma fp32 d64 64x64 extended"),
};

}  // namespace

extern const ForwardVariants kForwardD64 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80::fp32
