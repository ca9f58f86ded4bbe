#include "../../sm80/fp32/backward/instance.h"
#include "kernels.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

const BackwardVariant k64[] = {
    backward_variant<64, 4, 1, 64, 2, 2, 2, true, false, true>("wgmma fp32 d64 64 keys x 64"),
    backward_variant<64, 4, 1, 64, 2, 2, 2, false, false, true>("wgmma fp32 d64 64 queries x 64"),
    backward_variant<64, 4, 1, 64, 2, 2, 2, true, true, true>("wgmma fp32 d64 64 keys x 64 extended"),
    backward_variant<64, 4, 1, 64, 2, 2, 2, false, true, true>("wgmma fp32 d64 64 queries x 64 extended"),
};
const BackwardVariant k128[] = {
    backward_variant<128, 8, 1, 32, 4, 2, 1, true, false, true>("wgmma fp32 d128 128 keys x 32"),
    backward_variant<128, 8, 1, 32, 4, 2, 1, false, false, true>("wgmma fp32 d128 128 queries x 32"),
    backward_variant<128, 8, 1, 32, 4, 2, 1, true, true, true>("wgmma fp32 d128 128 keys x 32 extended"),
    backward_variant<128, 8, 1, 32, 4, 2, 1, false, true, true>("wgmma fp32 d128 128 queries x 32 extended"),
};

}  // namespace

extern const BackwardVariants kWgmmaBackwardD64 = {k64, sizeof(k64) / sizeof(k64[0])};
extern const BackwardVariants kWgmmaBackwardD128 = {k128, sizeof(k128) / sizeof(k128[0])};

}  // namespace flash_attn::cuda::sm80::fp32
