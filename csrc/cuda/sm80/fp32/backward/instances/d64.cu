#include "../instance.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

const BackwardVariant kVariants[] = {
    variant_of_all<64, 32, 3, false>("mma fp32 d64 64x32"),
    variant_of_all<64, 32, 2, true>("mma fp32 d64 64x32 extended"),
    backward_variant<64, 4, 1, 32, 2, 2, 2, kDk | kDv, false>("mma fp32 d64 64 keys x 32"),
    backward_variant<64, 4, 1, 64, 2, 2, 2, kDq, false>("mma fp32 d64 64 queries x 64"),
    backward_variant<64, 4, 1, 32, 2, 2, 2, kDk | kDv, true>("mma fp32 d64 64 keys x 32 extended"),
    backward_variant<64, 4, 1, 32, 2, 2, 2, kDq, true>("mma fp32 d64 64 queries x 32 extended"),
};

}  // namespace

extern const BackwardVariants kBackwardD64 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80::fp32
