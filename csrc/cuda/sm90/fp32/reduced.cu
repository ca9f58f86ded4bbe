// Of numbers rounded to fp16: one product instead of three.
#include "instance.h"

namespace flash_attn::cuda::sm90::fp32 {
namespace {

const ForwardVariant kForward64[] = {
    in_turns<true, 64, 12, 64, false>("wgmma fp32 d64 192x64 reduced turns", kManyColumns),
    forward_variant<true, 64, 4, 64, 3, false>("wgmma fp32 d64 64x64 reduced"),
    in_turns<true, 64, 8, 64, true>("wgmma fp32 d64 128x64 reduced extended turns", kManyColumns),
    forward_variant<true, 64, 4, 64, 2, true>("wgmma fp32 d64 64x64 reduced extended"),
};
const ForwardVariant kForward128[] = {
    in_turns<true, 128, 8, 64, false>("wgmma fp32 d128 128x64 reduced turns"),
    in_turns<true, 128, 8, 64, true>("wgmma fp32 d128 128x64 reduced extended turns"),
};
const BackwardVariant kBackward64[] = {
    all_in_turns<true, 64, 64, false>("wgmma fp32 d64 128x64 reduced turns"),
    all_in_turns<true, 64, 64, true>("wgmma fp32 d64 128x64 reduced extended turns"),
    backward_variant<true, 64, 4, 64, 2, kDk | kDv, false>("wgmma fp32 d64 64 keys x 64 reduced"),
    backward_variant<true, 64, 4, 64, 2, kDq, false>("wgmma fp32 d64 64 queries x 64 reduced"),
    backward_variant<true, 64, 4, 64, 2, kDk | kDv, true>("wgmma fp32 d64 64 keys x 64 reduced extended"),
    backward_variant<true, 64, 4, 64, 2, kDq, true>("wgmma fp32 d64 64 queries x 64 reduced extended"),
};
const BackwardVariant kBackward128[] = {
    all_in_turns<true, 128, 32, false>("wgmma fp32 d128 128x32 reduced turns"),
    variant_of_all<true, 128, 8, 32, 1, true>("wgmma fp32 d128 128x32 reduced extended"),
    backward_variant<true, 128, 8, 32, 1, kDk | kDv, false>("wgmma fp32 d128 128 keys x 32 reduced"),
    backward_variant<true, 128, 8, 32, 1, kDq, false>("wgmma fp32 d128 128 queries x 32 reduced"),
    backward_variant<true, 128, 8, 32, 1, kDk | kDv, true>("wgmma fp32 d128 128 keys x 32 reduced extended"),
    backward_variant<true, 128, 8, 32, 1, kDq, true>("wgmma fp32 d128 128 queries x 32 reduced extended"),
};

template <typename Variants, typename Variant, int kCount>
constexpr Variants list(const Variant (&variants)[kCount]) {
  return {variants, kCount};
}

}  // namespace

extern const ForwardVariants kReducedForwardD64 = list<ForwardVariants>(kForward64);
extern const ForwardVariants kReducedForwardD128 = list<ForwardVariants>(kForward128);
extern const BackwardVariants kReducedBackwardD64 = list<BackwardVariants>(kBackward64);
extern const BackwardVariants kReducedBackwardD128 = list<BackwardVariants>(kBackward128);

}  // namespace flash_attn::cuda::sm90::fp32
