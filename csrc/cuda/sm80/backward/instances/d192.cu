#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const BackwardVariant kVariants[] = {
    backward_variant<192, 64, 128, 2, 4, 1, 1, Rules::kPlain, kGpus90>("mma d192 128x64 w8 s1", {490, 7000}),
    backward_variant<192, 64, 128, 2, 4, 1, 1, Rules::kDropout, kGpus90>("mma d192 128x64 w8 s1 dropout", {450, 7000}),
    backward_variant<192, 64, 128, 2, 4, 1, 1, Rules::kExtended, kGpus90>("mma d192 128x64 w8 s1 extended",
                                                                          {240, 7000}),
    backward_variant<192, 64, 64, 2, 4, 2, 1, Rules::kPlain, kGpus163Kb | kGpus227Kb>("mma d192 64x64 w8", {400, 7000}),
    backward_variant<192, 64, 64, 2, 4, 2, 1, Rules::kExtended, kGpus163Kb | kGpus100>("mma d192 64x64 w8 extended",
                                                                                       {220, 6000}),
    backward_variant<192, 64, 32, 1, 2, 1, 1, Rules::kPlain, kGpus99Kb>("mma d192 32x64 w8 s1", {350, 5000}),
    backward_variant<192, 64, 32, 1, 2, 1, 1, Rules::kExtended, kGpus99Kb>("mma d192 32x64 w8 s1 extended",
                                                                           {170, 5000}),
};

}  // namespace

extern const BackwardVariants kBackwardD192 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0]),
                                               mask_gradient_variant<192, 32, 1, 2>()};

}  // namespace flash_attn::cuda::sm80
