#include "../instance.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

using Products = MmaProducts</*kReduced=*/true>;

const ForwardVariant kVariants[] = {
    forward_variant<64, 4, 1, 64, 2, 3, false, Products>("mma fp32 d64 64x64 reduced"),
    forward_variant<64, 4, 1, 64, 2, 2, true, Products>("mma fp32 d64 64x64 reduced extended"),
};

}  // namespace

extern const ForwardVariants kReducedForwardD64 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80::fp32
