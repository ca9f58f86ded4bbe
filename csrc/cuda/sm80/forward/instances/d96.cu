#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<96, 4, 2, 64, 2, 3, Rules::kPlain, kGpus163Kb | kGpus227Kb>("mma d96 128x64", {690, 5500, 16000}),
    forward_variant<96, 4, 1, 64, 2, 3, Rules::kPlain, kAllGpus>("mma d96 64x64", {560, 2200, 8000}),
    forward_variant<96, 4, 2, 64, 2, 3, Rules::kDropout, kGpus163Kb | kGpus227Kb>("mma d96 128x64 dropout",
                                                                                  {540, 5500, 16000}),
    forward_variant<96, 4, 2, 64, 2, 3, Rules::kMask, kGpus163Kb | kGpus227Kb>("mma d96 128x64 mask",
                                                                               {540, 5500, 16000}),
    forward_variant<96, 4, 2, 64, 2, 3, Rules::kBias, kAllGpus>("mma d96 128x64 bias", {520, 5500, 16000}),
    forward_variant<96, 4, 1, 64, 2, 3, Rules::kExtended, kAllGpus>("mma d96 64x64 extended", {320, 2500, 10000}),
};

}  // namespace

extern const ForwardVariants kForwardD96 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
