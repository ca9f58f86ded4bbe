// Makes table entries of kernel configurations; for the files of instances/ alone.
#pragma once

#include "../kernel.h"
#include "../variant.h"
#include "block.h"

namespace flash_attn::cuda::decode {

template <int kHeadDim, int kBlockM, int kBlocksPerSm, bool kFloat8 = false>
Variant variant(const char* name) {
  using StoredBf16 = std::conditional_t<kFloat8, __nv_fp8_e4m3, __nv_bfloat16>;
  using StoredFp16 = std::conditional_t<kFloat8, __nv_fp8_e4m3, __half>;
  using Bf16 = Config<__nv_bfloat16, StoredBf16, kHeadDim, kBlockM, kBlocksPerSm>;
  using Fp16 = Config<__half, StoredFp16, kHeadDim, kBlockM, kBlocksPerSm>;
  return {name,
          kHeadDim,
          kHeadDim,
          kBlockM,
          Bf16::kBlockN,
          Bf16::kThreads,
          kBlocksPerSm,
          Memory<Bf16>::kFixedBytes,
          Bf16::kStageBytes,
          kStagesOfPart<Bf16>,
          kFloat8,
          {decode_kernel<BlockByBlock<WarpState<Bf16>>>, decode_kernel<BlockByBlock<WarpState<Fp16>>>}};
}

}  // namespace flash_attn::cuda::decode
