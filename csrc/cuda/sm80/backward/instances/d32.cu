#include "../instance.h"

namespace flash_attn::cuda::sm80 {
namespace {

const BackwardVariant kVariants[] = {
    backward_variant<32, 64, 64, 2, 2, 2, 3, Rules::kPlain, kAllGpus>("mma d32 64x64 w4", {345, 2500}),
};

}  // namespace

extern const BackwardVariants kBackwardD32 = {kVariants, sizeof(kVariants) / sizeof(kVariants[0]), {}};

}  // namespace flash_attn::cuda::sm80
