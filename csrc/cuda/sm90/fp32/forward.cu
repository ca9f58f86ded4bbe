#include "instance.h"

namespace flash_attn::cuda::sm90::fp32 {
namespace {

const ForwardVariant k64[] = {
    in_turns<false, 64, 12, 64, false>("wgmma fp32 d64 192x64 turns", kManyColumns),
    forward_variant<false, 64, 4, 64, 3, false>("wgmma fp32 d64 64x64"),
    in_turns<false, 64, 8, 64, true>("wgmma fp32 d64 128x64 extended turns", kManyColumns),
    forward_variant<false, 64, 4, 64, 2, true>("wgmma fp32 d64 64x64 extended"),
};
const ForwardVariant k128[] = {
    in_turns<false, 128, 8, 64, false>("wgmma fp32 d128 128x64 turns"),
    in_turns<false, 128, 8, 64, true>("wgmma fp32 d128 128x64 extended turns"),
};
const ForwardVariant k192[] = {
    forward_variant<false, 192, 8, 32, 1, false>("wgmma fp32 d192 128x32"),
    forward_variant<false, 192, 8, 32, 1, true>("wgmma fp32 d192 128x32 extended"),
};
const ForwardVariant k256[] = {
    forward_variant<false, 256, 8, 32, 1, false>("wgmma fp32 d256 128x32"),
    forward_variant<false, 256, 8, 32, 1, true>("wgmma fp32 d256 128x32 extended"),
};

}  // namespace

extern const ForwardVariants kForwardD64 = {k64, sizeof(k64) / sizeof(k64[0])};
extern const ForwardVariants kForwardD128 = {k128, sizeof(k128) / sizeof(k128[0])};
extern const ForwardVariants kForwardD192 = {k192, sizeof(k192) / sizeof(k192[0])};
extern const ForwardVariants kForwardD256 = {k256, sizeof(k256) / sizeof(k256[0])};

}  // namespace flash_attn::cuda::sm90::fp32
