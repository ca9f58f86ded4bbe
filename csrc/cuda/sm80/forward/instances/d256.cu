#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<256, 4, 2, 64, 2, 2, Rules::kPlain, kGpus163Kb | kGpus227Kb, 2>("mma d256 64x64",
                                                                                    {720, 7000, 16000}),
    forward_variant<256, 4, 1, 80, 2, 2, Rules::kPlain, kGpus227Kb>("mma d256 64x80 rows", {690, 5700, 16000}),
    forward_variant<256, 4, 1, 64, 2, 2, Rules::kPlain, kGpus99Kb>("mma d256 64x64 rows", {650, 7000, 20000}),
    forward_variant<256, 4, 2, 64, 2, 2, Rules::kDropout, kGpus163Kb | kGpus227Kb, 2>("mma d256 64x64 dropout",
                                                                                      {600, 7000, 16000}),
    forward_variant<256, 4, 2, 64, 2, 2, Rules::kMask, kGpus163Kb | kGpus227Kb, 2>("mma d256 64x64 mask",
                                                                                   {600, 7000, 16000}),
    forward_variant<256, 4, 2, 64, 2, 2, Rules::kBias, kGpus163Kb | kGpus227Kb, 2>("mma d256 64x64 bias",
                                                                                   {560, 7000, 16000}),
    forward_variant<256, 4, 2, 64, 2, 2, Rules::kExtended, kGpus163Kb | kGpus90, 2>("mma d256 64x64 extended",
                                                                                    {330, 7000, 16000}),
    forward_variant<256, 4, 1, 32, 2, 2, Rules::kExtended, kGpus99Kb | kGpus100>("mma d256 64x32 extended",
                                                                                 {220, 5000, 16000}),
};

}  // namespace

extern const ForwardVariants kForwardD256 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
