// Makes table entries of a warpgroup's kernels; for the files of instances/ alone.
#pragma once

#include "../variant.h"
#include "block.h"

namespace flash_attn::cuda::decode {

template <int kHeadDim, int kBlockN, int kBlocksPerSm>
Variant warpgroup_variant(const char* name) {
  using Bf16 = WarpgroupConfig<__nv_bfloat16, kHeadDim, kBlockN, kBlocksPerSm>;
  using Fp16 = WarpgroupConfig<__half, kHeadDim, kBlockN, kBlocksPerSm>;
  return {name,
          kHeadDim,
          kHeadDim,
          Bf16::kBlockM,
          kBlockN,
          Bf16::kThreads,
          kBlocksPerSm,
          Memory<Bf16>::kFixedBytes,
          Bf16::kStageBytes,
          kStagesOfPart<Bf16>,
          false,
          {decode_kernel<BlockByBlock<WarpgroupState<Bf16>>>, decode_kernel<BlockByBlock<WarpgroupState<Fp16>>>}};
}

}  // namespace flash_attn::cuda::decode
