#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<32, 4, 2, 128, 2, 3, Rules::kPlain, kAllGpus>("mma d32 128x128", {440, 4500, 16000}),
    forward_variant<32, 4, 2, 64, 3, 3, Rules::kPlain, kAllGpus>("mma d32 128x64", {420, 2700, 10000}),
    forward_variant<32, 4, 1, 64, 4, 3, Rules::kPlain, kAllGpus>("mma d32 64x64", {370, 1600, 8000}),
};

}  // namespace

extern const ForwardVariants kForwardD32 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
