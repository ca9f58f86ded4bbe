#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<128, 4, 2, 64, 2, 3, false, kAllGpus>("mma d128 128x64", {750, 6500, 20000}),
    forward_variant<128, 4, 1, 64, 2, 3, false, kAllGpus>("mma d128 64x64", {530, 2700, 8000}),
    forward_variant<128, 4, 1, 64, 2, 3, true, kAllGpus>("mma d128 64x64 extended", {350, 5000, 20000}),
};

}  // namespace

extern const ForwardVariants kForwardD128 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
