#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<128, 4, 2, 64, 2, 3, Rules::kPlain, kAllGpus>("mma d128 128x64", {775, 6000, 10000}),
    forward_variant<128, 4, 2, 48, 2, 3, Rules::kPlain, kAllGpus>("mma d128 128x48", {740, 5900, 10000}),
    forward_variant<128, 4, 1, 64, 3, 3, Rules::kPlain, kAllGpus>("mma d128 64x64", {535, 2400, 8000}),
    forward_variant<128, 4, 2, 64, 2, 3, Rules::kDropout, kAllGpus>("mma d128 128x64 dropout", {600, 6500, 20000}),
    forward_variant<128, 4, 2, 64, 2, 3, Rules::kMask, kAllGpus>("mma d128 128x64 mask", {600, 6500, 20000}),
    forward_variant<128, 4, 2, 64, 2, 3, Rules::kBias, kGpus227Kb>("mma d128 128x64 bias", {580, 6500, 20000}),
    forward_variant<128, 4, 2, 64, 2, 2, Rules::kBias, kGpus99Kb | kGpus163Kb>("mma d128 128x64 s2 bias",
                                                                               {560, 6500, 20000}),
    forward_variant<128, 4, 1, 64, 2, 3, Rules::kExtended, kAllGpus>("mma d128 64x64 extended", {350, 5000, 20000}),
};

}  // namespace

extern const ForwardVariants kForwardD128 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
