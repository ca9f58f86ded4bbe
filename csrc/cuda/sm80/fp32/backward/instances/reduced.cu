#include "../instance.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

using Products = MmaProducts</*kReduced=*/true>;

const BackwardVariant kVariants[] = {
    variant_of_all<64, 32, 3, false, Products>("mma fp32 d64 64x32 reduced"),
    variant_of_all<64, 32, 2, true, Products>("mma fp32 d64 64x32 reduced extended"),
    backward_variant<64, 4, 1, 32, 2, 2, 2, kDk | kDv, false, Products>("mma fp32 d64 64 keys x 32 reduced"),
    backward_variant<64, 4, 1, 64, 2, 2, 2, kDq, false, Products>("mma fp32 d64 64 queries x 64 reduced"),
    backward_variant<64, 4, 1, 32, 2, 2, 2, kDk | kDv, true, Products>("mma fp32 d64 64 keys x 32 reduced extended"),
    backward_variant<64, 4, 1, 32, 2, 2, 2, kDq, true, Products>("mma fp32 d64 64 queries x 32 reduced extended"),
};

}  // namespace

extern const BackwardVariants kReducedBackwardD64 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80::fp32
