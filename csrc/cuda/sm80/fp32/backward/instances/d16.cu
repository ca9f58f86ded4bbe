#include "../instance.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

const BackwardVariant kVariants[] = {
    backward_variant<16, 4, 1, 64, 1, 2, 2, true>("mma fp32 d16 64 keys x 64"),
    backward_variant<16, 4, 1, 64, 1, 2, 2, false>("mma fp32 d16 64 queries x 64"),
};

}  // namespace

extern const BackwardVariants kBackwardD16 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80::fp32
