#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const BackwardVariant kVariants[] = {
    backward_variant<128, 128, 64, 2, 2, 2, 1, Rules::kPlain, kGpus163Kb | kGpus227Kb>("mma d128 64x128 w8",
                                                                                       {610, 6000}),
    backward_variant<128, 128, 64, 2, 2, 2, 1, Rules::kDropout, kGpus163Kb | kGpus227Kb>("mma d128 64x128 w8 dropout",
                                                                                         {510, 6000}),
    backward_variant<128, 128, 64, 2, 2, 2, 1, Rules::kMask, kGpus163Kb | kGpus227Kb>("mma d128 64x128 w8 mask",
                                                                                      {480, 6000}),
    backward_variant<128, 128, 64, 2, 2, 2, 1, Rules::kBias, kGpus163Kb | kGpus227Kb>("mma d128 64x128 w8 bias",
                                                                                      {390, 6000}),
    backward_variant<128, 128, 64, 2, 2, 2, 1, Rules::kExtended, kGpus163Kb | kGpus90>("mma d128 64x128 w8 extended",
                                                                                       {300, 6000}),
    backward_variant<128, 64, 32, 2, 2, 2, 1, Rules::kPlain, kGpus99Kb>("mma d128 32x64 w4", {480, 4000}),
    backward_variant<128, 64, 32, 2, 2, 2, 1, Rules::kDropout, kGpus99Kb>("mma d128 32x64 w4 dropout", {400, 4000}),
    backward_variant<128, 64, 32, 2, 2, 2, 1, Rules::kMask, kGpus99Kb>("mma d128 32x64 w4 mask", {380, 4000}),
    backward_variant<128, 64, 32, 2, 2, 2, 1, Rules::kExtended, kGpus99Kb | kGpus100>("mma d128 32x64 w4 extended",
                                                                                      {240, 4000}),
};

}  // namespace

extern const BackwardVariants kBackwardD128 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0]),
                                               mask_gradient_variant<128, 64, 2, 2>()};

}  // namespace flash_attn::cuda::sm80
