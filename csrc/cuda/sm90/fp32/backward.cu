#include "../../sm80/fp32/backward/instance.h"
#include "all_gradients.h"
#include "kernels.h"
#include "products.h"

namespace flash_attn::cuda::sm90::fp32 {
namespace {

using namespace sm80::fp32;

template <int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, int kGradients, bool kExtended>
using Config = BackwardConfig<kHeadDim, kWarps, 1, kBlockN, kHeadDim / 32, 2, kBlocksPerSm, kGradients, kExtended,
                              WarpgroupProducts>;

template <int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, int kGradients, bool kExtended>
BackwardVariant variant(const char* name) {
  using C = Config<kHeadDim, kWarps, kBlockN, kBlocksPerSm, kGradients, kExtended>;
  return backward_variant_of<C, BackwardBlock<C>>(name);
}
/// All gradients in one kernel.
template <int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, bool kExtended>
BackwardVariant variant_of_all(const char* name) {
  using C = GradientsConfig<Config<kHeadDim, kWarps, kBlockN, kBlocksPerSm, kDk | kDv, kExtended>>;
  return backward_variant_of<C, GradientsBlock<C>>(name, kDq | kDk | kDv);
}

const BackwardVariant k64[] = {
    variant_of_all<64, 4, 64, 2, false>("wgmma fp32 d64 64x64"),
    variant_of_all<64, 4, 64, 2, true>("wgmma fp32 d64 64x64 extended"),
    variant<64, 4, 64, 2, kDk | kDv, false>("wgmma fp32 d64 64 keys x 64"),
    variant<64, 4, 64, 2, kDq, false>("wgmma fp32 d64 64 queries x 64"),
    variant<64, 4, 64, 2, kDk | kDv, true>("wgmma fp32 d64 64 keys x 64 extended"),
    variant<64, 4, 64, 2, kDq, true>("wgmma fp32 d64 64 queries x 64 extended"),
};
const BackwardVariant k128[] = {
    variant_of_all<128, 8, 32, 1, false>("wgmma fp32 d128 128x32"),
    variant_of_all<128, 8, 32, 1, true>("wgmma fp32 d128 128x32 extended"),
    variant<128, 8, 32, 1, kDk | kDv, false>("wgmma fp32 d128 128 keys x 32"),
    variant<128, 8, 32, 1, kDq, false>("wgmma fp32 d128 128 queries x 32"),
    variant<128, 8, 32, 1, kDk | kDv, true>("wgmma fp32 d128 128 keys x 32 extended"),
    variant<128, 8, 32, 1, kDq, true>("wgmma fp32 d128 128 queries x 32 extended"),
};

}  // namespace

extern const BackwardVariants kBackwardD64 = {k64, sizeof(k64) / sizeof(k64[0])};
extern const BackwardVariants kBackwardD128 = {k128, sizeof(k128) / sizeof(k128[0])};

}  // namespace flash_attn::cuda::sm90::fp32
