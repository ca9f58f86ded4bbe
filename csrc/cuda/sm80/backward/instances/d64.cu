#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const BackwardVariant kVariants[] = {
    backward_variant<64, 128, 128, 2, 2, 2, 1, Rules::kPlain, kGpus163Kb | kGpus227Kb>("mma d64 128x128 w8",
                                                                                       {565, 6000}),
    backward_variant<64, 128, 128, 2, 2, 2, 1, Rules::kDropout, kGpus163Kb | kGpus227Kb>("mma d64 128x128 w8 dropout",
                                                                                         {480, 6000}),
    backward_variant<64, 128, 128, 2, 2, 2, 1, Rules::kMask, kGpus163Kb | kGpus227Kb>("mma d64 128x128 w8 mask",
                                                                                      {450, 6000}),
    backward_variant<64, 128, 128, 2, 2, 2, 1, Rules::kBias, kGpus163Kb | kGpus227Kb>("mma d64 128x128 w8 bias",
                                                                                      {360, 6000}),
    backward_variant<64, 128, 128, 2, 2, 2, 1, Rules::kExtended, kGpus163Kb | kGpus90>("mma d64 128x128 w8 extended",
                                                                                       {280, 6000}),
    backward_variant<64, 128, 64, 2, 2, 2, 1, Rules::kPlain, kGpus99Kb>("mma d64 64x128 w8", {500, 5000}),
    backward_variant<64, 128, 64, 2, 2, 2, 1, Rules::kDropout, kGpus99Kb>("mma d64 64x128 w8 dropout", {420, 5000}),
    backward_variant<64, 128, 64, 2, 2, 2, 1, Rules::kMask, kGpus99Kb>("mma d64 64x128 w8 mask", {400, 5000}),
    backward_variant<64, 128, 64, 2, 2, 2, 1, Rules::kBias, kGpus99Kb>("mma d64 64x128 w8 bias", {320, 5000}),
    backward_variant<64, 128, 64, 2, 2, 2, 1, Rules::kExtended, kGpus99Kb | kGpus100>("mma d64 64x128 w8 extended",
                                                                                      {250, 5000}),
};

}  // namespace

extern const BackwardVariants kBackwardD64 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0]),
                                              mask_gradient_variant<64, 64, 2, 2>()};

}  // namespace flash_attn::cuda::sm80
