#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const BackwardVariant kVariants[] = {
    backward_variant<256, 64, 128, 2, 4, 1, 1, Rules::kPlain, kGpus227Kb>("mma d256 128x64 w8 s1", {590, 8000}),
    backward_variant<256, 64, 128, 2, 4, 1, 1, Rules::kDropout, kGpus227Kb>("mma d256 128x64 w8 s1 dropout",
                                                                            {540, 8000}),
    backward_variant<256, 64, 64, 2, 4, 1, 1, Rules::kPlain, kGpus163Kb>("mma d256 64x64 w8 s1", {500, 7000}),
    backward_variant<256, 64, 64, 2, 4, 1, 1, Rules::kExtended, kGpus163Kb | kGpus227Kb>(
        "mma d256 64x64 w8 s1 extended", {250, 7000}),
    backward_variant<256, 32, 32, 1, 2, 1, 1, Rules::kPlain, kGpus99Kb>("mma d256 32x32 w4 s1", {300, 5000}),
    backward_variant<256, 32, 32, 1, 2, 1, 1, Rules::kExtended, kGpus99Kb>("mma d256 32x32 w4 s1 extended",
                                                                           {150, 5000}),
};

}  // namespace

extern const BackwardVariants kBackwardD256 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0]),
                                               mask_gradient_variant<256, 32, 1, 2>()};

}  // namespace flash_attn::cuda::sm80
