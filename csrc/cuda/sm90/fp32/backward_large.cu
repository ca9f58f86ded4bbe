// Head dims beyond 128: dK and dV do not fit in registers together.
#include "../../sm80/fp32/backward/instance.h"
#include "kernels.h"
#include "products.h"

namespace flash_attn::cuda::sm90::fp32 {
namespace {

using namespace sm80::fp32;

template <int kHeadDim, int kStages, int kGradients, bool kExtended>
BackwardVariant variant(const char* name) {
  return backward_variant<kHeadDim, 4, 1, 32, kHeadDim / 32, kStages, 1, kGradients, kExtended,
                          WarpgroupProducts<false>>(name);
}

const BackwardVariant k192[] = {
    variant<192, 2, kDk, false>("wgmma fp32 d192 64 keys x 32 dk"),
    variant<192, 2, kDv, false>("wgmma fp32 d192 64 keys x 32 dv"),
    variant<192, 2, kDq, false>("wgmma fp32 d192 64 queries x 32"),
    variant<192, 2, kDk, true>("wgmma fp32 d192 64 keys x 32 dk extended"),
    variant<192, 2, kDv, true>("wgmma fp32 d192 64 keys x 32 dv extended"),
    variant<192, 2, kDq, true>("wgmma fp32 d192 64 queries x 32 extended"),
};
const BackwardVariant k256[] = {
    variant<256, 1, kDk, false>("wgmma fp32 d256 64 keys x 32 dk"),
    variant<256, 2, kDv, false>("wgmma fp32 d256 64 keys x 32 dv"),
    variant<256, 1, kDq, false>("wgmma fp32 d256 64 queries x 32"),
    variant<256, 1, kDk, true>("wgmma fp32 d256 64 keys x 32 dk extended"),
    variant<256, 2, kDv, true>("wgmma fp32 d256 64 keys x 32 dv extended"),
    variant<256, 1, kDq, true>("wgmma fp32 d256 64 queries x 32 extended"),
};

}  // namespace

extern const BackwardVariants kBackwardD192 = {k192, sizeof(k192) / sizeof(k192[0])};
extern const BackwardVariants kBackwardD256 = {k256, sizeof(k256) / sizeof(k256[0])};

}  // namespace flash_attn::cuda::sm90::fp32
