// Makes table entries of kernel configurations; for the files of instances/ alone.
#pragma once

#include "kernel.h"
#include "mask_gradient_kernel.h"
#include "variant.h"

namespace flash_attn::cuda::sm80 {

template <int kHeadDim, int kBlockN, int kBlockM, int kKeyTiles, int kWarpsQ, int kStages, int kBlocksPerSm,
          Rules kRules, unsigned kGpus>
BackwardVariant backward_variant(const char* name, const StepClocks& clocks = {}) {
  using Bf16 = BackwardConfig<__nv_bfloat16, kHeadDim, kBlockN, kBlockM, kKeyTiles, kWarpsQ, kStages, kBlocksPerSm,
                              kRules, kGpus>;
  using Fp16 =
      BackwardConfig<__half, kHeadDim, kBlockN, kBlockM, kKeyTiles, kWarpsQ, kStages, kBlocksPerSm, kRules, kGpus>;
  return {name,
          kHeadDim,
          kBlockM,
          kBlockN,
          Bf16::kWarps,
          kBlocksPerSm,
          Bf16::kSharedBytes,
          kRules,
          kGpus,
          clocks,
          {backward_kernel<Bf16>, backward_kernel<Fp16>}};
}

template <int kHeadDim, int kBlock, int kKeyTiles, int kBlocksPerSm, unsigned kGpus = kAllGpus>
MaskGradientVariant mask_gradient_variant() {
  using Bf16 =
      BackwardConfig<__nv_bfloat16, kHeadDim, kBlock, kBlock, kKeyTiles, 2, 1, kBlocksPerSm, Rules::kExtended, kGpus>;
  using Fp16 = BackwardConfig<__half, kHeadDim, kBlock, kBlock, kKeyTiles, 2, 1, kBlocksPerSm, Rules::kExtended, kGpus>;
  return {kBlock, kBlock, Bf16::kWarps, Bf16::kSharedBytes, {mask_gradient_kernel<Bf16>, mask_gradient_kernel<Fp16>}};
}

}  // namespace flash_attn::cuda::sm80
