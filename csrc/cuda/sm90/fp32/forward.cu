#include "../../sm80/fp32/forward/instance.h"
#include "forward_block.h"
#include "kernels.h"
#include "products.h"

namespace flash_attn::cuda::sm90::fp32 {
namespace {

template <int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, bool kExtended>
using Config =
    sm80::fp32::ForwardConfig<kHeadDim, kWarps, 1, kBlockN, kHeadDim / 32, kBlocksPerSm, kExtended, WarpgroupProducts>;

template <int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, bool kExtended>
ForwardVariant variant(const char* name) {
  using C = Config<kHeadDim, kWarps, kBlockN, kBlocksPerSm, kExtended>;
  return sm80::fp32::forward_variant_of<C, sm80::fp32::ForwardBlock<C>>(name);
}
template <int kHeadDim, int kWarps, int kBlockN, int kBlocksPerSm, bool kExtended>
ForwardVariant pipelined(const char* name) {
  using C = Config<kHeadDim, kWarps, kBlockN, kBlocksPerSm, kExtended>;
  return sm80::fp32::forward_variant_of<C, PipelinedBlock<C>>(name);
}

const ForwardVariant k64[] = {
    variant<64, 4, 64, 3, false>("wgmma fp32 d64 64x64"),
    pipelined<64, 4, 64, 2, false>("wgmma fp32 d64 64x64 pipelined"),
    variant<64, 4, 64, 2, true>("wgmma fp32 d64 64x64 extended"),
};
const ForwardVariant k128[] = {
    pipelined<128, 8, 64, 1, false>("wgmma fp32 d128 128x64 pipelined"),
    variant<128, 8, 64, 1, false>("wgmma fp32 d128 128x64"),
    pipelined<128, 8, 64, 1, true>("wgmma fp32 d128 128x64 extended pipelined"),
    variant<128, 8, 64, 1, true>("wgmma fp32 d128 128x64 extended"),
};
const ForwardVariant k192[] = {
    variant<192, 8, 32, 1, false>("wgmma fp32 d192 128x32"),
    variant<192, 8, 32, 1, true>("wgmma fp32 d192 128x32 extended"),
};
const ForwardVariant k256[] = {
    variant<256, 8, 32, 1, false>("wgmma fp32 d256 128x32"),
    variant<256, 8, 32, 1, true>("wgmma fp32 d256 128x32 extended"),
};

}  // namespace

extern const ForwardVariants kForwardD64 = {k64, sizeof(k64) / sizeof(k64[0])};
extern const ForwardVariants kForwardD128 = {k128, sizeof(k128) / sizeof(k128[0])};
extern const ForwardVariants kForwardD192 = {k192, sizeof(k192) / sizeof(k192[0])};
extern const ForwardVariants kForwardD256 = {k256, sizeof(k256) / sizeof(k256[0])};

}  // namespace flash_attn::cuda::sm90::fp32
