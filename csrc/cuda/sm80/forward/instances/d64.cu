#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<64, 4, 2, 128, 2, 3, Rules::kPlain, kGpus163Kb | kGpus227Kb>("mma d64 128x128", {680, 3300, 9000}),
    forward_variant<64, 4, 2, 48, 3, 3, Rules::kPlain, kAllGpus>("mma d64 128x48", {640, 2800, 10000}),
    forward_variant<64, 4, 1, 64, 3, 3, Rules::kPlain, kAllGpus>("mma d64 64x64", {545, 1900, 8000}),
    forward_variant<64, 4, 2, 64, 2, 3, Rules::kDropout, kAllGpus>("mma d64 128x64 dropout", {500, 5000, 20000}),
    forward_variant<64, 4, 2, 64, 2, 3, Rules::kMask, kAllGpus>("mma d64 128x64 mask", {500, 5000, 20000}),
    forward_variant<64, 4, 2, 128, 2, 3, Rules::kBias, kGpus227Kb>("mma d64 128x128 bias", {545, 5000, 20000}),
    forward_variant<64, 4, 2, 64, 2, 3, Rules::kBias, kAllGpus>("mma d64 128x64 bias", {480, 5000, 20000}),
    forward_variant<64, 4, 2, 64, 2, 3, Rules::kExtended, kAllGpus>("mma d64 128x64 extended", {330, 5000, 20000}),
    forward_variant<64, 4, 1, 64, 3, 3, Rules::kExtended, kAllGpus>("mma d64 64x64 extended", {300, 2500, 10000}),
};

}  // namespace

extern const ForwardVariants kForwardD64 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
