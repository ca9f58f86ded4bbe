#include "../instance.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

const BackwardVariant kVariants[] = {
    backward_variant<128, 8, 1, 16, 4, 2, 1, true, false>("mma fp32 d128 128 keys x 16"),
    backward_variant<128, 8, 1, 32, 4, 2, 1, false, false>("mma fp32 d128 128 queries x 32"),
    backward_variant<128, 4, 1, 32, 4, 2, 1, false, false>("mma fp32 d128 64 queries x 32"),
    backward_variant<128, 8, 1, 16, 4, 2, 1, true, true>("mma fp32 d128 128 keys x 16 extended"),
    backward_variant<128, 8, 1, 32, 4, 2, 1, false, true>("mma fp32 d128 128 queries x 32 extended"),
};

}  // namespace

extern const BackwardVariants kBackwardD128 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80::fp32
