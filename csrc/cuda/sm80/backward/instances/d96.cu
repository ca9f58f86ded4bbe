#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const BackwardVariant kVariants[] = {
    backward_variant<96, 128, 64, 2, 2, 2, 1, Rules::kPlain, kGpus163Kb | kGpus227Kb>("mma d96 64x128 w8",
                                                                                      {530, 12000}),
    backward_variant<96, 64, 64, 2, 2, 2, 2, Rules::kPlain, kAllGpus>("mma d96 64x64 w4", {500, 5000}),
    backward_variant<96, 64, 64, 2, 2, 2, 2, Rules::kDropout, kAllGpus>("mma d96 64x64 w4 dropout", {430, 5000}),
    backward_variant<96, 64, 64, 2, 2, 2, 2, Rules::kMask, kAllGpus>("mma d96 64x64 w4 mask", {400, 5000}),
    backward_variant<96, 64, 64, 2, 2, 2, 2, Rules::kBias, kAllGpus>("mma d96 64x64 w4 bias", {330, 5000}),
    backward_variant<96, 64, 64, 2, 2, 2, 2, Rules::kExtended, kAllGpus>("mma d96 64x64 w4 extended", {250, 5000}),
};

}  // namespace

extern const BackwardVariants kBackwardD96 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0]),
                                              mask_gradient_variant<96, 64, 2, 2>()};

}  // namespace flash_attn::cuda::sm80
