#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const BackwardVariant kVariants[] = {
    backward_variant<512, 32, 64, 1, 4, 1, 1, Rules::kPlain, kGpus227Kb>("mma d512 64x32 w8 s1", {345, 10000}),
    backward_variant<512, 32, 64, 1, 4, 1, 1, Rules::kExtended, kGpus227Kb>("mma d512 64x32 w8 s1 extended",
                                                                            {170, 10000}),
};

}  // namespace

extern const BackwardVariants kBackwardD512 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0]),
                                               mask_gradient_variant<512, 32, 1, 1, kGpus227Kb>()};

}  // namespace flash_attn::cuda::sm80
