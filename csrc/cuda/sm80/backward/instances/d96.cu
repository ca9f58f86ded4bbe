#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const BackwardVariant kVariants[] = {
    backward_variant<96, 64, 64, 2, 2, 2, 2, false, kAllGpus>("mma d96 64x64 w4"),
    backward_variant<96, 64, 64, 2, 2, 2, 2, true, kAllGpus>("mma d96 64x64 w4 extended"),
};

}  // namespace

extern const BackwardVariants kBackwardD96 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0]),
                                              mask_gradient_variant<96, 64, 2, 2>()};

}  // namespace flash_attn::cuda::sm80
