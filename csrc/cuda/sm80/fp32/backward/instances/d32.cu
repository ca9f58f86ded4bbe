#include "../instance.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

const BackwardVariant kVariants[] = {
    variant_of_all<32, 64, 2, false>("mma fp32 d32 64x64"),
    backward_variant<32, 4, 1, 64, 2, 2, 2, kDk | kDv, false>("mma fp32 d32 64 keys x 64"),
    backward_variant<32, 4, 1, 64, 2, 2, 2, kDq, false>("mma fp32 d32 64 queries x 64"),
};

}  // namespace

extern const BackwardVariants kBackwardD32 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80::fp32
