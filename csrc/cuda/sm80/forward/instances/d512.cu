#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const ForwardVariant kVariants[] = {
    forward_variant<512, 8, 2, 64, 1, 2, Rules::kPlain, kGpus227Kb, 4>("mma d512 64x64", {540, 10000, 16000}),
    forward_variant<512, 8, 1, 32, 1, 2, Rules::kPlain, kGpus163Kb, 2>("mma d512 64x32", {420, 8000, 16000}),
    forward_variant<512, 4, 1, 32, 1, 2, Rules::kPlain, kGpus99Kb | kGpus227Kb, 2>("mma d512 32x32",
                                                                                   {410, 6000, 12000}),
    forward_variant<512, 8, 2, 64, 1, 2, Rules::kExtended, kGpus227Kb, 4>("mma d512 64x64 extended",
                                                                          {330, 10000, 16000}),
    forward_variant<512, 8, 1, 32, 1, 2, Rules::kExtended, kGpus163Kb, 2>("mma d512 64x32 extended",
                                                                          {250, 8000, 16000}),
    forward_variant<512, 4, 1, 32, 1, 2, Rules::kExtended, kGpus99Kb | kGpus227Kb, 2>("mma d512 32x32 extended",
                                                                                      {250, 6000, 12000}),
};

}  // namespace

extern const ForwardVariants kForwardD512 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0])};

}  // namespace flash_attn::cuda::sm80
