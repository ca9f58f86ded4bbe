#include "instance.h"

namespace flash_attn::cuda::sm90::fp32 {
namespace {

const BackwardVariant k64[] = {
    all_in_turns<false, 64, 64, false>("wgmma fp32 d64 128x64 turns"),
    all_in_turns<false, 64, 64, true>("wgmma fp32 d64 128x64 extended turns"),
    backward_variant<false, 64, 4, 64, 2, kDk | kDv, false>("wgmma fp32 d64 64 keys x 64"),
    backward_variant<false, 64, 4, 64, 2, kDq, false>("wgmma fp32 d64 64 queries x 64"),
    backward_variant<false, 64, 4, 64, 2, kDk | kDv, true>("wgmma fp32 d64 64 keys x 64 extended"),
    backward_variant<false, 64, 4, 64, 2, kDq, true>("wgmma fp32 d64 64 queries x 64 extended"),
};
const BackwardVariant k128[] = {
    all_in_turns<false, 128, 32, false>("wgmma fp32 d128 128x32 turns"),
    variant_of_all<false, 128, 8, 32, 1, true>("wgmma fp32 d128 128x32 extended"),
    backward_variant<false, 128, 8, 32, 1, kDk | kDv, false>("wgmma fp32 d128 128 keys x 32"),
    backward_variant<false, 128, 8, 32, 1, kDq, false>("wgmma fp32 d128 128 queries x 32"),
    backward_variant<false, 128, 8, 32, 1, kDk | kDv, true>("wgmma fp32 d128 128 keys x 32 extended"),
    backward_variant<false, 128, 8, 32, 1, kDq, true>("wgmma fp32 d128 128 queries x 32 extended"),
};

}  // namespace

extern const BackwardVariants kBackwardD64 = {k64, sizeof(k64) / sizeof(k64[0])};
extern const BackwardVariants kBackwardD128 = {k128, sizeof(k128) / sizeof(k128[0])};

}  // namespace flash_attn::cuda::sm90::fp32
