#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<192, 4, 2, 64, 2, 3, Rules::kPlain, kGpus163Kb | kGpus227Kb, 2>("mma d192 64x64",
                                                                                    {650, 5500, 16000}),
    forward_variant<192, 4, 2, 64, 2, 2, Rules::kPlain, kGpus99Kb | kGpus163Kb, 2>("mma d192 64x64 s2",
                                                                                   {620, 5500, 16000}),
    forward_variant<192, 4, 2, 64, 2, 2, Rules::kDropout, kGpus163Kb | kGpus227Kb, 2>("mma d192 64x64 s2 dropout",
                                                                                      {540, 5500, 16000}),
    forward_variant<192, 4, 2, 64, 2, 2, Rules::kMask, kGpus163Kb | kGpus227Kb, 2>("mma d192 64x64 s2 mask",
                                                                                   {540, 5500, 16000}),
    forward_variant<192, 4, 2, 64, 2, 2, Rules::kBias, kGpus163Kb | kGpus227Kb, 2>("mma d192 64x64 s2 bias",
                                                                                   {500, 5500, 16000}),
    forward_variant<192, 4, 2, 64, 2, 2, Rules::kExtended, kAllGpus, 2>("mma d192 64x64 s2 extended",
                                                                        {320, 5500, 16000}),
};

}  // namespace

extern const ForwardVariants kForwardD192 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
