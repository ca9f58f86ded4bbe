#include "../variant.h"
#include "pair.h"

namespace flash_attn::cuda::decode {
namespace {

using Bf16 = LatentConfig<__nv_bfloat16>;
using Fp16 = LatentConfig<__half>;

}  // namespace

extern const Variant kLatent = {"decode d576 v512 64x32",
                                Bf16::kHeadDim,
                                Bf16::kHeadDimV,
                                Bf16::kBlockM,
                                Bf16::kBlockN,
                                Bf16::kThreads,
                                Bf16::kBlocksPerSm,
                                Memory<Bf16>::kFixedBytes,
                                Bf16::kStageBytes,
                                kStagesOfPart<Bf16>,
                                false,
                                {decode_kernel<LatentPair<Bf16>>, decode_kernel<LatentPair<Fp16>>}};

}  // namespace flash_attn::cuda::decode
