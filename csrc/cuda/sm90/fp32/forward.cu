#include "../../sm80/fp32/forward/instance.h"
#include "kernels.h"

namespace flash_attn::cuda::sm80::fp32 {
namespace {

const ForwardVariant k64[] = {
    forward_variant<64, 4, 1, 64, 2, 3, false, true>("wgmma fp32 d64 64x64"),
    forward_variant<64, 4, 1, 64, 2, 2, true, true>("wgmma fp32 d64 64x64 extended"),
};
const ForwardVariant k128[] = {
    forward_variant<128, 8, 1, 64, 4, 1, false, true>("wgmma fp32 d128 128x64"),
    forward_variant<128, 8, 1, 64, 4, 1, true, true>("wgmma fp32 d128 128x64 extended"),
};

}  // namespace

extern const ForwardVariants kWgmmaForwardD64 = {k64, sizeof(k64) / sizeof(k64[0])};
extern const ForwardVariants kWgmmaForwardD128 = {k128, sizeof(k128) / sizeof(k128[0])};

}  // namespace flash_attn::cuda::sm80::fp32
